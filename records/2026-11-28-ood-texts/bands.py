"""Where the driven rule and CE differ: python records/2026-11-28-ood-texts/bands.py TEXT RUN ..., from the root of a
checkout. Prints for each run, by how often the training text has the target: share of the text's tokens, NLL
(nats), the same after the run's temperature, and how much of the mean NLL the band makes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from data.lm import load_corpus, load_text_set  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from data.windows import Windows, token_counts  # noqa: E402
from eval.ood import forwards, read_run  # noqa: E402
from kernels import linear_moments  # noqa: E402
from model.gpt2_hub import load_start  # noqa: E402

FREQUENCY = ((0, 0), (1, 3), (4, 15), (16, 63), (64, 10**9))


@torch.no_grad()
def main(text: str, *runs: str) -> None:
    for run in map(Path, runs):
        config, summary = read_run(run)
        model, files = load_start(run / f"{summary['reported']}.pt")
        model.eval()
        tokenizer = Tokenizer.from_files(files, "of-a-run")
        train = load_corpus(
            config["data"], tokenizer=config["tokenizer"], cache=config["cache"], splits=("train",)
        ).train
        counts = torch.from_numpy(token_counts(np.asarray(train.tokens), tokenizer.vocab_size))
        windows = Windows(load_text_set(text, tokenizer, "runs/ood_texts/cache"), config["seq_len"])
        parts = []
        for hidden, y in forwards(model, windows, 16, torch.device("cpu")):
            scales = 1.0, 1 / summary["temperature"]
            logs = [linear_moments(hidden, model.head_weight, y, scale=scale).log_p for scale in scales]
            keep = y >= 0
            parts.append(torch.stack([-logs[0][keep], -logs[1][keep], counts[y[keep]].double()]))
        nll, cooled, times = torch.cat(parts, 1).double()
        print(f"{run}, {text}: NLL {nll.mean():.3f}, after T {cooled.mean():.3f}")
        for low, high in FREQUENCY:
            mine = (times >= low) & (times <= high)
            share = mine.double().mean()
            print(f"  {low} to {high}: {100 * share:.2f} % of the tokens, NLL {nll[mine].mean():.3f}, ", end="")
            print(f"after T {cooled[mine].mean():.3f}; of the mean {share * nll[mine].mean():.3f}, ", end="")
            print(f"{share * cooled[mine].mean():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

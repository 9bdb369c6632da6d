"""What fine-tuning on GSM8K does on a device only: CUDA graphs in decoding, and the paged 8-bit optimizer.

pytest -m gpu
"""

import json
import random

import pytest
import torch

from model import decode as decoding
from model.decode import Request, decode
from model.decoder import Decoder, DecoderConfig

SHAPE = DecoderConfig(300, 64, 128, 2, 4, 2, 16, 512, tie_word_embeddings=True)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def requests(count: int, **more) -> list[Request]:
    r = random.Random(1)
    lengths = [1, 2, 140, *(r.randint(1, 60) for _ in range(count))][:count]
    return [Request([r.randrange(300) for _ in range(n)], r.randint(1, 30), **more) for n in lengths]


@pytest.mark.parametrize("span", [128, 200])
def test_a_step_reads_no_value(span):
    """On the meta device a read of a value on the host raises, as it does while a graph is captured, and so does a
    tensor left on the CPU. Both the step, which is captured, and the prompts' forward go through."""
    with torch.device("meta"):
        model = Decoder(SHAPE, torch.bfloat16)
    with torch.no_grad():
        step = decoding._Step(model, 5, 200)
        out = step.forward(span)
        decoding._prefill(model, step.cache, [(0, [1, 2, 3]), (3, list(range(40)))])
    assert out.shape == (5, 300) and out.device.type == "meta" and out.dtype == torch.bfloat16


class TestOnADevice:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_graphs_decode_what_eager_does(self, monkeypatch, dtype, temperature):
        """The same kernels on the same numbers, over two spans of the cache and with rows that are filled again: the
        same tokens, and one graph a span."""
        torch.manual_seed(0)
        model = Decoder(SHAPE, dtype).to("cuda").eval()
        wanted = requests(11, temperature=temperature, seed=3)
        graphs = []
        original = decoding._Step.logits

        def watched(self, span):
            out = original(self, span)
            graphs.append(len(self.graphs))
            return out

        monkeypatch.setattr(decoding._Step, "logits", watched)
        replayed = {one.index: one for ended in decode(model, wanted, 4) for one in ended}
        monkeypatch.setattr(decoding._Step, "logits", decoding._Step.forward)
        eager = {one.index: one for ended in decode(model, wanted, 4) for one in ended}
        assert replayed == eager and max(graphs) == 2

    @pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
    def test_adapters_are_captured_too(self, monkeypatch, tmp_path, base):
        """--no-merge: LoRA layers, and NF4's dequantisation, inside a graph."""
        from model.decoder_hub import save_decoder
        from model.lora import LoRAConfig, add_lora, load_base

        if base == "nf4":
            pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
        torch.manual_seed(0)
        save_decoder(Decoder(SHAPE), tmp_path / "model")
        model = load_base(tmp_path / "model", base, torch.bfloat16, "cuda")
        add_lora(model, LoRAConfig(4))
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.normal_(0, 0.05)
        model.eval()
        replayed = [one for ended in decode(model, requests(5), 2) for one in ended]
        monkeypatch.setattr(decoding._Step, "logits", decoding._Step.forward)
        assert replayed == [one for ended in decode(model, requests(5), 2) for one in ended]

    def test_paged_adamw8bit_is_adamw(self, tmp_path):
        """A regression of 2^17 parameters, paged because they are more than 1e5: it ends where AdamW in fp32 does, to
        10 % of the way (bitsandbytes' 8-bit AdamW on a CPU: 5.5 %), and a state that went through a file goes on bit
        for bit."""
        bnb = pytest.importorskip("bitsandbytes", reason="the optimizer is bitsandbytes'")
        torch.manual_seed(0)
        x, goal = torch.randn(256, 512, device="cuda"), torch.randn(512, 256, device="cuda")

        def loss(w):
            return ((x @ w - x @ goal) ** 2).mean()

        def train(optimizer, w, steps):
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                loss(w).backward()
                optimizer.step()

        ours, exact = (torch.zeros(512, 256, device="cuda", requires_grad=True) for _ in range(2))
        settings = dict(lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
        optimizer = bnb.optim.PagedAdamW8bit([ours], **settings)
        train(optimizer, ours, 40)
        train(torch.optim.AdamW([exact], **settings), exact, 40)
        assert (ours - exact).detach().norm() < 0.1 * exact.detach().norm()
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        again = ours.detach().clone().requires_grad_()
        resumed = bnb.optim.PagedAdamW8bit([again], **settings)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
        train(optimizer, ours, 3)
        train(resumed, again, 3)
        assert torch.equal(ours, again)

    @pytest.mark.parametrize("schedule", ["cosine", "fot"])
    def test_a_run_with_the_paged_optimizer(self, tmp_path, schedule):
        """finetune_gsm8k.py on the device: NF4, paged 8-bit AdamW, graphs, to the end of its summary."""
        import finetune_gsm8k
        from recipes import tiny_qwen3

        pytest.importorskip("bitsandbytes", reason="NF4 and the optimizer are bitsandbytes'")
        for split in ("train", "test"):
            rows = [
                {
                    "question": f"Ann has {i} apples and gets {i + 1} more.",
                    "answer": f"{i}+{i + 1}=<<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}\n#### {2 * i + 1}",
                }
                for i in range(40)
            ]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert tiny_qwen3.main(f"{tmp_path / 'model'} --data {tmp_path} --vocab 320 --layers 2 --steps 0".split()) == 0
        flags = f"--model {tmp_path / 'model'} --data {tmp_path} --out {tmp_path / 'run'} --optimizer paged-adamw8bit "
        flags += f"--steps 20 --batch 8 --heldout 8 --seq-len 256 --lr 1e-2 --schedule {schedule} "
        flags += "--log-every 5 --eval-every 10 --generate-tokens 16 --device cuda --segment-rms"
        flags += " --fot-window 4" * (schedule == "fot")
        assert finetune_gsm8k.main(flags.split()) == 0
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["final_train_loss"] < 5.5 and summary["skipped_steps"] == 0  # log 320 = 5.77 at the start
        assert summary["mfu"] is None or 0 < summary["mfu"] < 1

"""How the project's pictures look: colours, matplotlib's settings, the ticks of an axis of steps."""

import functools
import io
from pathlib import Path

from .commandline import package

# Okabe & Ito's palette (2008), distinct under the common colour-vision deficiencies, and three more. Yellow is left
# out on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a5a2b", "#7f7f7f", "#6a3d9a")
INK, FAINT = "#222222", "#8a8a8a"
STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.2, 1.5)))  # of lines that share a colour
RC = Path(__file__).with_name("pictures.mplstyle")  # matplotlib's settings


def styled(draw):
    """A decorator: `RC` holds inside the function and nowhere else."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with package("matplotlib.style", "the picture").context(RC):
            return draw(*args, **kwargs)

    return drawn


def thousands(value: float, _=None) -> str:
    """The label of a tick: 20k for 20,000."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def png(figure) -> bytes:
    """A matplotlib figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()

"""The small real model and the texts that ship with the package; licences in ``LICENSE`` here.

stories260k-llama is a trained 260 k parameter Llama that tells children's stories, so that the
demo, the tests and the examples in the documentation run anywhere, offline, in seconds.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent

#: Folder for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``.
STORIES260K = str(_FOLDER / "stories260k-llama")


def valid_text() -> str:
    """Stories for evaluation, about 61,000 tokens of stories260k; never calibrate on them."""
    return (_FOLDER / "tinystories_valid.txt").read_text(encoding="utf-8")


def calib_text() -> str:
    """Stories for calibration, from the training split."""
    return (_FOLDER / "tinystories_calib.txt").read_text(encoding="utf-8")

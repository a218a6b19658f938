"""Text from a data set on the Hub."""

from __future__ import annotations

from datasets import load_dataset
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # see io/checkpoint.py

from bitlathe.errors import CalibrationError

_WAYS_OUT = "Two ways out: name a text file of your own, or builtin for the text that comes with the package"


def dataset_text(name: str, purpose: str, characters: int) -> list[str]:
    """The first documents of a data set on the Hub, as many as hold `characters`. purpose: what they are for.

    Raises CalibrationError if they cannot be had.
    """
    try:
        rows = load_dataset(name, split="train", streaming=True)
        documents, length = [], 0
        for row in rows:
            text = row["text"]
            if not isinstance(text, str):
                raise CalibrationError(
                    f"the dataset {name!r} holds a {type(text).__name__} in its column 'text': name one of texts, or a file"
                )
            documents.append(text)
            length += len(text)
            if length >= characters:
                break
    except KeyError as error:
        raise CalibrationError(
            f"the dataset {name!r} has no column {error}: name one with a text column, or a text file"
        ) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise CalibrationError(
            f"the {purpose} text {name!r} is not a local file, and the Hub cannot be reached for it ({type(error).__name__}). "
            f"{_WAYS_OUT}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        # What it says beyond the first line is how to call a library that our users do not call.
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise CalibrationError(
            f"the {purpose} text {name!r} is not a local file, and as a dataset of the Hub it cannot be used: it must be open "
            f"to you and have texts in a split 'train' without naming a configuration ({reason}). {_WAYS_OUT}"
        ) from error
    return documents

"""transformers' processor of a model that writes, from a folder or hub id."""

from __future__ import annotations

from typing import Any

from cmapkd.models.errors import first_line


def read_processor(source: str, fetching: dict[str, Any], name: str) -> Any:
    from transformers import AutoProcessor

    try:
        native = AutoProcessor.from_pretrained(source, trust_remote_code=False, **fetching)
        if getattr(native, "tokenizer", None) is None or getattr(native, "image_processor", None) is None:
            raise ValueError("it has no tokenizer, or no image processor")
    except ImportError as error:
        raise ValueError(
            f"the processor of {name} needs a package that is not installed: {first_line(error)}"
        ) from None
    except Exception as error:
        raise ValueError(
            f"there is no usable processor for {name} in {source!r} ({type(error).__name__}: {first_line(error)}). It "
            "needs processor_config.json or preprocessor_config.json, tokenizer.json, tokenizer_config.json and "
            "chat_template.jinja there."
        ) from None
    return native

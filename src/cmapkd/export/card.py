"""The model card: front matter that the hub reads, and the numbers with their split and protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmapkd.config import in_markdown
from cmapkd.evaluation.headline import headlines, retrieval_set
from cmapkd.export.licence import Licence
from cmapkd.export.origin import Origin
from cmapkd.models import DualEncoder

_ONNX_USE = """```js
import {{ AutoTokenizer, CLIPTextModelWithProjection }} from '@huggingface/transformers';
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const text_model = await CLIPTextModelWithProjection.from_pretrained(folder);
const {{ text_embeds }} = await text_model(tokenizer(['a red ball'], {{ padding: {padding}, truncation: true }}));
```

```python
import onnxruntime
session = onnxruntime.InferenceSession("onnx/vision_model.onnx")
[image_embeds] = session.run(None, {{"pixel_values": pixels}})  # float32 [batch, 3, {size}, {size}]
```
"""
_PROTOCOL = "Every caption queries; equal scores count as the expectation over their orders."
_OF_FILES = """Cosine and error are between embeddings by the file and by the model. Noise is the mean squared
distance of unit embeddings, spread their variance. Milliseconds are of a batch of one; onnxruntime has one thread."""
_TRANSFORMERS_USE = """```python
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
```
"""
_OPEN_CLIP_USE = """```python
import open_clip
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
```
"""


def write_card(
    model: DualEncoder,
    folder: Path,
    *,
    form: str,
    origin: Origin,
    licence: Licence,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
    scored_on: str | None = None,
    files: Sequence[Mapping[str, Any]] = (),
    accepted: float | None = None,
) -> None:
    """`README.md` with front matter.

    Args:
        form: `onnx`, `transformers` or `open_clip`.
        scores: by precision, measured on `scored_on` with the files as they are.
        files: a row for each compared file: its name, bytes and parity.
        accepted: what `--accept-loss` allowed.
    """
    lines = [f"# {in_markdown(origin.name)}", "", licence.sentence, ""]
    lines += _about(model, origin)
    if scores:
        lines += ["## Scores", "", f"On {in_markdown(str(scored_on))}, measured with the files of this folder.", ""]
        lines += _score_table(scores)
    elif origin.scores:
        lines += ["## Scores", "", f"On {in_markdown(str(origin.scored_on))}, measured before the export.", ""]
        lines += _score_table({"student": origin.scores})
    if files:
        lines += ["## Files beside the model", "", *_file_table(files), "", _OF_FILES, ""]
        if accepted is not None:
            lines += [f"This export was allowed to lose {accepted:g} % of a cosine and {accepted:g} points.", ""]
    use = {"onnx": _ONNX_USE, "transformers": _TRANSFORMERS_USE, "open_clip": _OPEN_CLIP_USE}[form]
    if form == "onnx":
        padding = "true" if model.logit_bias is None else "'max_length'"
        use = use.format(padding=padding, size=model.image_spec.size)
    lines += ["## Use", "", use]
    if form == "onnx":
        lines += ["Embeddings are not normalised: divide each by its length before comparing by inner product.", ""]
    front = _front_matter(model, form, origin, licence, scores, scored_on)
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n" + "\n".join(lines), encoding="utf-8")


def _about(model: DualEncoder, origin: Origin) -> list[str]:
    spec = model.image_spec
    told = [f"A dual encoder of images and texts with {model.num_parameters():,} parameters, {model.embed_dim} wide."]
    if origin.teachers:
        told.append(f"Distilled from {in_markdown(', '.join(origin.teachers))} by `{origin.method}`.")
    elif origin.method:
        told.append(f"Trained by `{origin.method}` without a teacher.")
    if origin.data:
        told.append(f"Training data: {in_markdown(origin.data)}; seed {origin.seed}, one run.")
    fit = "short side resized, centre cropped" if spec.fit == "crop" else "both sides resized"
    told.append(
        f"Images: {spec.size} x {spec.size} pixels ({fit}, {spec.interpolation}), mean {list(spec.mean)}, standard "
        f"deviation {list(spec.std)} of pixels in [0, 1]. Texts: up to {model.tokenizer.context_length} tokens."
    )
    scale = model.log_logit_scale.exp().item()
    bias = "" if model.logit_bias is None else f", bias {model.logit_bias.item():.4f}"
    told.append(f"Logit scale {scale:.4f}{bias}.")
    return ["\n".join(told), ""]


def _score_table(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    heads = list(dict.fromkeys(headline.head for each in scores.values() for headline, _ in headlines(each).values()))
    rows = []
    for name, each in scores.items():
        found = {headline.head: number for headline, number in headlines(each).values()}
        rows.append([name, *(f"{found[head]:.2f}" if head in found else "" for head in heads)])
    table = _table(["", *heads], rows)
    first = next(iter(scores.values()))
    of = retrieval_set(first)
    return [*table, "", *([f"Retrieval in both directions, of {of}. {_PROTOCOL}", ""] if of else [])]


def _file_table(files: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ["file", "MB", "lowest cosine", "largest error", "noise / spread", "ms", "ms in torch"]
    rows = [
        [
            f"`{row['file']}`",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['cosine_min']:.6f}",
            f"{row['largest_error']:.1e}",
            f"{row['noise_to_spread']:.1e}",
            f"{row['milliseconds']:.2f}",
            f"{row['model_milliseconds']:.2f}",
        ]
        for row in files
    ]
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(each)} |" for each in (heads, ["---"] * len(heads), *rows)]


def _front_matter(
    model: DualEncoder,
    form: str,
    origin: Origin,
    licence: Licence,
    scores: Mapping[str, Mapping[str, Any]] | None,
    scored_on: str | None,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    kind = "clip" if model.logit_bias is None else "siglip"
    measured, on = (scores or {}).get("fp32") or origin.scores, scored_on if scores else origin.scored_on
    results = [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type="custom",
            dataset_name=str(on),
            metric_type=headline.label,
            metric_name=headline.head,
            metric_value=round(number, 2),
            verified=False,
        )
        for headline, number in headlines(measured).values()
    ]
    named: dict[str, Any] = {"model_name": origin.name, "eval_results": results} if results else {}
    data = ModelCardData(
        license=licence.front_matter,
        library_name={"onnx": "transformers.js"}.get(form, form),
        pipeline_tag="zero-shot-image-classification",
        tags=[kind, "cmapkd", "distillation", *(["onnx"] if form == "onnx" else [])],
        **named,
    )
    return str(data.to_yaml())

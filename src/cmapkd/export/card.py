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
distance of unit embeddings, spread their variance. Milliseconds are of a batch of one; the runtime has one thread."""
_OPENVINO_USE = """```python
import openvino
settings = {{"INFERENCE_PRECISION_HINT": "f32"}}  # without it, a CPU with bf16 computes in that: see the rows above
vision = openvino.Core().compile_model("openvino/vision_model.xml", "CPU", settings)
image_embeds = vision({{"pixel_values": pixels}})[0]  # float32 [batch, 3, {size}, {size}]
```
"""
_EXECUTORCH_USE = """```python
from executorch.runtime import Runtime
vision = Runtime.get().load_program("executorch/vision_model.pte").load_method("forward")
[image_embeds] = vision.execute([pixels])  # float32 [1, 3, {size}, {size}]
```

A file takes one sample at a time. Texts are padded to {length} tokens.
"""
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


_USES = {
    "onnx": _ONNX_USE,
    "openvino": _OPENVINO_USE,
    "executorch": _EXECUTORCH_USE,
    "transformers": _TRANSFORMERS_USE,
    "open_clip": _OPEN_CLIP_USE,
}
_OF_STORED = """Mean R@1 of both directions where embeddings are stored so, queries as well. int8: each number of a unit
vector times 127. bits: the signs. Rescored: signs propose 40 candidates, and floats choose."""


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
    embeddings: Mapping[str, Any] | None = None,
    accepted: float | None = None,
) -> None:
    """`README.md` with front matter.

    Args:
        form: `onnx`, `transformers`, `open_clip`, `openvino` or `executorch`.
        scores: by precision, measured on `scored_on` with the files as they are.
        files: a row for each compared file: its name, bytes and parity.
        embeddings: what `parity.json` says of them, on `scored_on`.
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
    if embeddings:
        lines += ["## Smaller embeddings", "", *_stored_table(embeddings), ""]
    use = _USES[form]
    graphs = form not in ("transformers", "open_clip")
    if graphs:
        padding = "true" if model.logit_bias is None else "'max_length'"
        sizes = {"size": model.image_spec.size, "length": model.tokenizer.context_length}
        use = use.format(padding=padding, **sizes)
    lines += ["## Use", "", use]
    if graphs:
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
            f"`{row['file']}`" + (f" in {row['computed_in']}" if row["precision"] == "default" else ""),
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


def _stored_table(embeddings: Mapping[str, Any]) -> list[str]:
    rows = embeddings["rows"]
    forms = list(rows[0]["forms"])
    told = [
        [f"{row['width']}{', rotated' if row['rotated'] else ''}"]
        + [f"{each['recall@1']:.2f} ({each['bytes']} bytes)" for each in row["forms"].values()]
        for row in rows
    ]
    rotated = embeddings["rotated_on"]
    rotation = f" The rotation was measured on {in_markdown(rotated)}." if rotated else ""
    return [*_table(["numbers", *forms], told), "", _OF_STORED + rotation]


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
        tags=[kind, "cmapkd", "distillation", *([form] if form in ("onnx", "openvino", "executorch") else [])],
        **named,
    )
    return str(data.to_yaml())

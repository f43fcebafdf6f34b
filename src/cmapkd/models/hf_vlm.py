"""`HfVlm`: transformers' image-text models that write, behind our contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError, closest
from cmapkd.config.disk import usual_rights
from cmapkd.data.dialogues import ChatInput
from cmapkd.models.base import eval_mode
from cmapkd.models.chat import HfChatProcessor, vocabulary_digest
from cmapkd.models.draws import KeyedChoice, until_end
from cmapkd.models.generative import CacheShape, Decoding, GenerativeModel
from cmapkd.models.lora import LoraConfig, adapter_names, adapters_of, add_adapters, merge, merged
from cmapkd.models.lora_files import read_adapters, write_adapters
from cmapkd.models.parts import refuse_empty, split_by_name
from cmapkd.models.storage import load_weights, read_weights, write_model_folder
from cmapkd.models.tap_attention import READABLE, attention_of
from cmapkd.models.token_types import EncodedShape, LogitHead, Rows, Seen, TokenFeatures, TokenNeeds, Vocabulary, Where
from cmapkd.models.types import LevelInfo
from cmapkd.models.vlm_folders import check_not_merged, check_same_tokens
from cmapkd.models.vlm_hooks import fed_to, feeding, given_to, outputs
from cmapkd.models.vlm_layouts import LAYOUTS, blocks_of, encoded_shape
from cmapkd.models.vlm_rows import packed_rows, positions, rows_at, tile_rows, unwindowed, visual_places, visual_rows


class HfVlm(GenerativeModel):
    """Wraps one of the classes in `LAYOUTS`.

    The model without its head is run, and only the states that somebody reads go on. These classes apply neither a
    scale nor a cap to their logits, whatever the config of their language model says, and nor does `head`.

    Args:
        model: transformers' model, with its head.
    Raises:
        ConfigError: the tokenizer has more tokens than the head has rows.
    """

    processor: HfChatProcessor

    def __init__(self, model: Any, *, processor: HfChatProcessor, name: str) -> None:
        super().__init__()
        self.model: Any = model
        self.name, self.processor = name, processor
        config = model.config
        self.layout = LAYOUTS[config.model_type]
        self.vocabulary = _vocabulary(model, processor, name)
        text = config.text_config
        self.image_levels = (*self._image_levels(), LevelInfo("projector", text.hidden_size, "tokens"))
        self.text_levels = _levels("layers", text.num_hidden_layers, text.hidden_size)

    @property
    def _vision(self) -> Any:
        return self.model.model.get_submodule(self.layout.vision)

    @property
    def _language(self) -> Any:
        return self.model.model.get_submodule(self.layout.language)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The language model's decoder layers, in their order."""
        return tuple(blocks_of(self._language))

    @property
    def _projector(self) -> Any:
        return self.model.model.get_submodule(self.layout.projector[0])

    @property
    def attention(self) -> str:
        return str(self.model.config._attn_implementation)

    @property
    def attention_heads(self) -> int | None:
        text = self._language.config
        return text.num_attention_heads if text._attn_implementation in READABLE else None

    @property
    def _vision_blocks(self) -> Sequence[nn.Module]:
        return tuple(blocks_of(self._vision))

    @property
    def head(self) -> LogitHead:
        layer, size = self.model.lm_head, self.vocabulary.size
        if size == len(layer.weight):  # a slice of all would be copied in the backward pass
            return LogitHead(layer.weight, layer.bias)
        return LogitHead(layer.weight[:size], None if layer.bias is None else layer.bias[:size])

    @property
    def cache_shape(self) -> CacheShape:
        text = self.model.config.text_config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return CacheShape(text.num_hidden_layers, heads, width)

    @property
    def parts(self) -> Mapping[str, frozenset[str]]:
        layout = self.layout
        prefixes = {
            "vision": [f"model.model.{layout.vision}"],
            "projector": [f"model.model.{name}" for name in layout.projector],
            "embeddings": [f"model.model.{layout.language}.embed_tokens"],
            "language": [f"model.model.{layout.language}"],
            "head": ["model.lm_head"],
            "adapters": [f"model.{name}" for name in adapter_names(self.model)],
        }
        return split_by_name((name for name, _ in self.named_parameters()), prefixes)

    def forward(self, inputs: ChatInput, needs: TokenNeeds | None = None) -> TokenFeatures:
        return self._features(inputs, needs or TokenNeeds(), None)

    @property
    def num_deeper(self) -> int:
        return len(getattr(self.model.config.vision_config, "deepstack_visual_indexes", None) or ())

    @property
    def encoded_shape(self) -> EncodedShape | None:
        return encoded_shape(self.layout, self.model.config, self.image_levels[0].width)

    def project(self, inputs: ChatInput, encoded: Tensor) -> Seen:
        if self.encoded_shape is None:
            return super().project(inputs, encoded)
        tokens = _flat(self._projector(encoded.to(self.model.dtype)))
        sample, place = visual_places(inputs.visual)
        if len(tokens) != len(sample):
            raise ValueError(f"{len(sample)} places of visual tokens got {len(tokens)} from the projector")
        return Seen(Rows(tokens, sample, place))

    def see(self, inputs: ChatInput) -> Seen:
        pictures = {name: rows for name, rows in self.arguments(inputs).items() if name in inputs.pictures}
        sample, place = visual_places(inputs.visual)
        if not pictures:
            width = self.image_levels[-1].width
            none = torch.zeros(0, width, device=self.device, dtype=self.model.dtype)
            return Seen(Rows(none, sample, place))
        found = self.model.model.get_image_features(**pictures, return_dict=True)
        deeper = getattr(found, "deepstack_features", None) or ()
        tokens = _flat(found.pooler_output)
        if len(tokens) != len(sample):
            raise ValueError(f"{len(sample)} places of visual tokens got {len(tokens)} from the pictures")
        return Seen(Rows(tokens, sample, place), tuple(_flat(each) for each in deeper))

    def forward_seeing(self, inputs: ChatInput, seen: Seen, needs: TokenNeeds | None = None) -> TokenFeatures:
        needs = needs or TokenNeeds()
        seeing = {info.name for info in self.image_levels[:-1]}
        inside = [name for name in needs.levels if name in seeing]
        if inside:
            raise ValueError(f"{', '.join(inside)} of {self.name} cannot be read: its vision tower sees nothing here")
        if len(seen.deeper) != self.num_deeper and len(seen.tokens.values):
            raise ValueError(
                f"{self.name} adds {self.num_deeper} further outputs of its vision tower to its first layers, and "
                f"{len(seen.deeper)} are given: feed a model without them, or what such a model's see() gave"
            )
        shape, width = tuple(seen.tokens.values.shape), self.image_levels[-1].width
        if shape != (int(inputs.visual.sum()), width):
            raise ValueError(
                f"visual tokens have shape {shape}, {self.name} reads ({int(inputs.visual.sum())}, {width}) here"
            )
        return self._features(inputs, needs, seen)

    def _features(self, inputs: ChatInput, needs: TokenNeeds, seen: Seen | None) -> TokenFeatures:
        self._check(needs)
        at = positions(inputs)
        layers = [name for name in needs.levels if name.startswith("layers.")]
        widths = {info.name: info.width for info in self.image_levels[:-1]}
        blocks = [name for name in needs.levels if name in widths]
        projected = needs.projected or "projector" in needs.levels
        with ExitStack() as hooks:
            kept = hooks.enter_context(outputs({name: self.layers[_number(name)] for name in layers}))
            shown = hooks.enter_context(self._vision_outputs(blocks))
            if seen is not None:
                hooks.enter_context(feeding(self._language, inputs.visual, seen.tokens.values, seen.deeper))
            fed = hooks.enter_context(fed_to(self._language)) if projected else {}
            given = hooks.enter_context(given_to(self._projector if needs.encoded else None))
            tap = attention_of(self._language, needs.attention, mean=needs.attention_mean, hidden=needs.hidden)
            maps = hooks.enter_context(tap)
            arguments = self.arguments(inputs, pixels=seen is None)
            states = self.model.model(**arguments, use_cache=False).last_hidden_state
        if self.text_levels[-1].name in layers:
            kept[self.text_levels[-1].name] = states  # after the final norm
        asked: dict[Where, Tensor] = {where: mask for where, mask in at.items() if where in needs.where}
        levels: dict[str, Mapping[Where, Rows]] = {name: _selected(kept[name], asked) for name in layers}
        levels |= {name: {"visual": self._patches(shown.get(name), inputs, width=widths[name])} for name in blocks}
        tokens = visual_rows(fed["inputs_embeds"], inputs.visual) if projected else None
        if tokens is not None and "projector" in needs.levels:
            levels["projector"] = {"visual": tokens}
        return TokenFeatures(
            hidden=_selected(states, asked),
            targets=inputs.texts.ids[inputs.answer],
            head=self.head,
            projected=tokens if needs.projected else None,
            levels=levels,
            attention=maps,
            encoded=given[0] if given else None,
        )

    @torch.no_grad()
    def generate(self, inputs: ChatInput, how: Decoding, keys: Sequence[int] | None = None) -> list[list[int]]:
        if how.temperature > 0 and (keys is None or len(keys) != len(inputs)):
            raise ValueError(f"tokens are drawn for {len(inputs)} dialogues: give a key for each of them")
        prompts = inputs.prompts()
        start = prompts.texts.ids.shape[1]
        choice = KeyedChoice(
            size=self.vocabulary.size,
            never=(self.vocabulary.image_id, *how.never),
            start=start,
            keys=None if how.temperature <= 0 else keys,
            temperature=how.temperature,
            top_p=how.top_p,
        )
        with eval_mode(self), self.plain_generation(how):
            written = self.model.generate(**self.arguments(prompts), logits_processor=[choice])
        return [until_end(row, self.vocabulary.end_ids) for row in written[:, start:].tolist()]

    def write(self, folder: Path) -> None:
        """Ours, and transformers' own: the Auto classes read model and processor from the folder.

        Adapters are merged into the weights, and written a second time by themselves, in `adapters/`, as peft does.
        """
        options = {
            "model_type": self.model.config.model_type,
            "max_tokens": self.processor.max_tokens,
        }
        write_model_folder(folder, family="hf", name=self.name, options=options)
        with merged(self.model):
            self.model.save_pretrained(folder)
        if adapters_of(self.model):
            write_adapters(self.model, folder / "adapters", base=self.name)
        usual_rights(folder.glob("*.safetensors"))
        self.processor.native.save_pretrained(folder)

    def adapt(self, config: LoraConfig) -> None:
        """Puts adapters beside layers of the language model. From then on they learn, and what `config.learn` names.

        Raises:
            ConfigError, ValueError: there are no such layers, or the adapters of a folder do not fit.
        """
        self._adapters_of = config.folder
        if config.folder is None:
            add_adapters(self._language, config, name=self.name)
        else:
            read_adapters(self.model, f"model.{self.layout.language}", config.folder)
        parts = self.parts
        refuse_empty(parts, config.learn, where=f"{self.name}: lora.learn")
        learning = frozenset().union(*(parts[part] for part in ("adapters", *config.learn)))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in learning)

    _adapters_of: Path | None = None

    def num_parameters(self) -> int:
        """Without adapters, which a saved model has in its weights."""
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        return sum(sizes.values()) - sum(sizes[f"model.{name}"] for name in adapter_names(self.model))

    def merge_adapters(self) -> None:
        """Leaves an ordinary model behind: every adapter is added to its layer's weight."""
        merge(self.model)

    def load_checkpoint(self, path: str | Path, *, averaged: bool = False) -> None:
        """Also takes the weights that adapters are to be learned on: the adapters stay as they are then.

        Raises:
            ConfigError: the file's model has other tokens, or the adapters are in its weights already.
        """
        check_same_tokens(self, Path(path).parent)
        if self._adapters_of is not None:
            check_not_merged(self._adapters_of, Path(path).parent)
        weights, own = read_weights(path, averaged=averaged), self.state_dict()
        adapters = [f"model.{name}" for name in adapter_names(self.model)]
        if not any(name in weights for name in adapters):
            weights |= {name: own[name] for name in adapters}
        load_weights(self, weights, where=path)

    def arguments(self, inputs: ChatInput, *, pixels: bool = True) -> dict[str, Tensor]:
        """What transformers' model reads. Without pixels, grids of pictures still say where visual tokens stand."""
        pictures = {
            name: (rows.to(self.model.dtype) if rows.is_floating_point() else rows)
            for name, rows in inputs.pictures.items()
            if len(rows) and (pixels or name == "image_grid_thw")
        }
        if self.layout.nested:
            pictures = {name: rows[None] for name, rows in pictures.items()}
        return {
            "input_ids": inputs.texts.ids,
            "attention_mask": inputs.texts.mask.long(),
            **inputs.sequence,
            **pictures,
        }

    def _image_levels(self) -> tuple[LevelInfo, ...]:
        width = getattr(self.model.config.vision_config, self.layout.width)
        return _levels("blocks", len(self._vision_blocks), width)

    @contextmanager
    def _vision_outputs(self, levels: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """What the vision tower gives at these levels inside this context, as `_patches` takes it."""
        with outputs({name: self._vision_blocks[_number(name)] for name in levels}) as kept:
            yield kept

    def _patches(self, values: Tensor | None, inputs: ChatInput, *, width: int) -> Rows:
        """A vision block's output as rows of patches; none where the batch has no picture."""
        if values is None:
            none = inputs.texts.ids.new_zeros(0)
            return Rows(torch.zeros(0, width, device=none.device, dtype=self.model.dtype), none, none)
        if self.layout.packed:
            grids = inputs.pictures["image_grid_thw"]
            if self.layout.windowed:
                values = unwindowed(values, self._vision, grids)
            return packed_rows(values, grids, self._vision.spatial_merge_size, inputs.extents["image_grid_thw"])
        patch = self.model.config.vision_config.patch_size
        side = patch if isinstance(patch, int) else patch[0]
        return tile_rows(values, inputs.pictures["pixel_values"], side, inputs.extents["pixel_values"])

    def _check(self, needs: TokenNeeds) -> None:
        known = [level.name for level in (*self.image_levels, *self.text_levels)]
        for name in needs.levels:
            if name not in known:
                raise ValueError(
                    f"{self.name} has no level {name!r}{closest(name, known)}. It has: {', '.join(known)}."
                )
        wrong = [layer for layer in needs.attention if not 0 <= layer < len(self.text_levels)]
        if wrong:
            raise ValueError(f"{self.name} has layers 0 to {len(self.text_levels) - 1}, no {wrong}")

    @contextmanager
    def plain_generation(self, how: Decoding) -> Iterator[None]:
        """Without the settings of decoding that a hub's folder may bring, and without traces for the next forward."""
        from transformers import GenerationConfig

        before = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            max_new_tokens=how.max_new_tokens,
            min_new_tokens=how.min_new_tokens or None,
            do_sample=False,
            num_beams=1,
            eos_token_id=list(self.vocabulary.end_ids),
            pad_token_id=self.vocabulary.pad_id,
        )
        try:
            yield
        finally:
            self.model.generation_config = before
            if hasattr(self.model.model, "rope_deltas"):  # positions of the dialogues that were just written
                self.model.model.rope_deltas = None


def _vocabulary(model: Any, processor: HfChatProcessor, name: str) -> Vocabulary:
    tokenizer = processor.native.tokenizer
    size, rows = max(tokenizer.get_vocab().values()) + 1, int(model.lm_head.weight.shape[0])
    if size > rows:
        raise ConfigError(
            f"the tokenizer of {name} has {size} tokens, but its head writes {rows}: give the tokenizer that it was "
            "trained with"
        )
    stated = model.generation_config.eos_token_id
    others = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    if tokenizer.eos_token_id is not None:
        others.append(tokenizer.eos_token_id)
    added = set(tokenizer.get_added_vocab().values())
    return Vocabulary(
        size=size,
        rows=rows,
        end_ids=tuple(dict.fromkeys([processor.end_id, *others])),
        pad_id=processor.pad_id,
        image_id=processor.image_id,
        digest=vocabulary_digest(tokenizer),
        pieces=tuple(piece or "" for piece in tokenizer.convert_ids_to_tokens(range(size))),
        lead=processor.lead,
        spoken=1 + max((number for number in tokenizer.get_vocab().values() if number not in added), default=-1),
    )


def _levels(kind: str, count: int, width: int) -> tuple[LevelInfo, ...]:
    return tuple(LevelInfo(f"{kind}.{number}", int(width), "tokens") for number in range(count))


def _number(level: str) -> int:
    return int(level.rpartition(".")[2])


def _flat(found: Any) -> Tensor:
    """Float[rows width] of a picture's, a list of pictures', or a table of tiles' visual tokens."""
    rows = found if isinstance(found, Tensor) else torch.cat(list(found))
    return rows.reshape(-1, rows.shape[-1])


def _selected(states: Tensor, asked: Mapping[Where, Tensor]) -> dict[Where, Rows]:
    return {
        where: visual_rows(states, mask) if where == "visual" else rows_at(states, mask)
        for where, mask in asked.items()
    }

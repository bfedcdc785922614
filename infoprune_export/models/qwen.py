"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size as one packed sequence of patches.

The tower computes what the Hugging Face modules do, with two differences that make it trace on every grid. Patches stay
in image order: Qwen2.5-VL's window attention gathers and scatters around each attention instead of permuting the whole
stream, because norm, FFN and merger are indifferent to order. And segments come planned (see `packing`).

Visual tokens are the merger's outputs, one per m x m patches; selection works on them (as published for this family).
Qwen3-VL's deepstack features, read from intermediate blocks, are appended to them along the last axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from infoprune_export.errors import InfopruneError
from infoprune_export.models import packing
from infoprune_export.models.attention import Context, Segments, received_attention, rotary
from infoprune_export.models.tower import (
    Activations,
    Block,
    BlockNames,
    Form,
    Inputs,
    Layout,
    Planned,
    Prior,
    VisionTower,
    image_noise,
    require,
)


def _names(*ffn_in: str, ffn_out: str) -> BlockNames:
    return BlockNames(
        attention="attn",
        qkv=("qkv",),
        out="proj",
        ffn="mlp",
        ffn_in=ffn_in,
        ffn_out=ffn_out,
        attention_norm="norm1",
        ffn_norm="norm2",
    )


_NAMES = {
    "qwen2_vl": _names("fc1", ffn_out="fc2"),
    "qwen2_5_vl": _names("gate_proj", "up_proj", ffn_out="down_proj"),
    "qwen3_vl": _names("linear_fc1", ffn_out="linear_fc2"),
}
_THETA = 10000.0


class QwenTower(VisionTower):
    """Patch embedding, blocks with rotary embedding, merger."""

    ragged = True
    position_axes = 3

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        vision = model.config.vision_config
        self._visual = model.model.visual
        self.merge = int(vision.spatial_merge_size)
        self.patch_size, self.temporal_patch_size = int(vision.patch_size), int(vision.temporal_patch_size)
        # Qwen2-VL calls the tower's width embed_dim and the language model's hidden_size.
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        self._head_dim = width // vision.num_heads
        self._theta = float((getattr(vision, "rope_parameters", None) or {}).get("rope_theta", _THETA))
        full = getattr(vision, "fullatt_block_indexes", None)
        self._window = int(vision.window_size) // self.merge // self.patch_size if full is not None else 0
        self.blocks = [
            Block(
                module,
                _NAMES[model.config.model_type],
                self._head_dim,
                windowed=full is not None and number not in full,
            )
            for number, module in enumerate(self._visual.blocks)
        ]
        self.tapped = tuple(getattr(vision, "deepstack_visual_indexes", ()))
        self._side = int(vision.num_position_embeddings**0.5) if hasattr(self._visual, "pos_embed") else 0
        if self.tapped:
            self.selection_width = int(vision.out_hidden_size)

    # ── Planning ──

    @property
    def _patch_values(self) -> int:
        return int(self._visual.patch_embed.proj.weight[0].numel())

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        require(inputs, "pixel_values", "image_grid_thw")
        if (
            inputs["image_grid_thw"].ndim != 2
            or inputs["image_grid_thw"].shape[1] != 3
            or not len(inputs["image_grid_thw"])
        ):
            raise InfopruneError(
                f"image_grid_thw {list(inputs['image_grid_thw'].shape)}: this tower takes one row of frames, rows and "
                "columns per image"
            )
        shape = tuple(inputs["pixel_values"].shape)
        if len(shape) != 2 or shape[1] != self._patch_values:
            raise InfopruneError(
                f"pixel_values {list(shape)}: this tower takes [patches, {self._patch_values}]; "
                "let the model's own processor cut the patches"
            )
        packing.check_grids(_grids(inputs), self.merge, shape[0])

    def layouts(self, inputs: Inputs) -> list[Layout]:
        layouts = []
        for frames, rows, columns in _grids(inputs):
            extents = (frames, rows // self.merge, columns // self.merge)
            places = torch.meshgrid(*(torch.arange(extent) for extent in extents), indexing="ij")
            layouts.append(Layout(torch.stack(places).flatten(1), max(extents[1:])))
        return layouts

    def split(self, inputs: Inputs) -> list[dict[str, Tensor]]:
        sizes = inputs["image_grid_thw"].prod(1).tolist()
        return [
            {"pixel_values": pixels, "image_grid_thw": grid[None]}
            for pixels, grid in zip(inputs["pixel_values"].split(sizes), inputs["image_grid_thw"], strict=True)
        ]

    def plan(self, inputs: Inputs, form: Form) -> dict[str, Tensor]:
        grids = _grids(inputs)
        if not form.several and (len(grids) > 1 or grids[0][0] > 1):
            raise InfopruneError(
                f"{len(grids)} images, the first of {grids[0][0]} frames: this encoder takes one image per call"
            )
        arrays: dict[str, NDArray[Any]] = {"position_ids": packing.patch_positions(grids, self.merge)}
        if self._side:
            arrays["place_index"], arrays["place_weight"] = packing.bilinear_places(grids, self.merge, self._side)
        if form.several:
            arrays["frame_index"], arrays["frame_inverse"] = packing.padded_gather(list(packing.frame_segments(grids)))
        if self._window:
            arrays["window_index"], arrays["window_inverse"] = packing.padded_gather(
                list(packing.window_segments(grids, self.merge, self._window)), (self._window * self.merge) ** 2
            )
        if form.several and form.selecting:
            arrays["token_index"], arrays["token_counts"] = packing.image_tokens(grids, self.merge)
        pixels = inputs["pixel_values"]
        return {"pixel_values": pixels, **{k: torch.from_numpy(v).to(pixels.device) for k, v in arrays.items()}}

    def dynamic_shapes(self, form: Form) -> dict[str, dict[int, Any]]:
        # The extent is a multiple of the merge unit by construction; otherwise it could not be proven in the graph.
        patches = self.merge**2 * torch.export.Dim("tokens", min=2)
        shapes: dict[str, dict[int, Any]] = {"pixel_values": {0: patches}, "position_ids": {0: patches}}
        if self._side:
            shapes |= {"place_index": {0: patches}, "place_weight": {0: patches}}
        if form.several:
            frames = {0: torch.export.Dim("frames", min=1), 1: torch.export.Dim("frame_length", min=4)}
            shapes |= {"frame_index": frames, "frame_inverse": {0: patches}}
        if self._window:
            shapes |= {"window_index": {0: torch.export.Dim("windows", min=1)}, "window_inverse": {0: patches}}
        if form.several and form.selecting:
            images = torch.export.Dim("images", min=1)
            shapes |= {"token_index": {0: images, 1: torch.export.Dim("longest", min=1)}, "token_counts": {0: images}}
        return shapes

    def example_inputs(self, images: int, generator: torch.Generator) -> dict[str, Tensor]:
        # Different sizes, most of them no multiple of the window.
        sides = [(8, 8), (9, 7), (6, 10)]
        grids = [(1, rows * self.merge, columns * self.merge) for rows, columns in sides]
        return self.grid_inputs([grids[i % len(grids)] for i in range(images)], generator)

    def grid_inputs(self, grids: Sequence[packing.Grid], generator: torch.Generator) -> dict[str, Tensor]:
        """Random inputs for these grids."""
        size, repeat = self.patch_size, self.temporal_patch_size
        return self._of_videos(
            [image_noise(frames * repeat, rows * size, columns * size, generator) for frames, rows, columns in grids]
        )

    def of_pictures(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inputs of normalised images [3, H, W] whose sides are multiples of a visual token's."""
        return self._of_videos([picture.expand(self.temporal_patch_size, -1, -1, -1) for picture in pictures])

    def _of_videos(self, videos: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inputs of videos [F, 3, H, W]; one image is a few equal frames."""
        m, size, patches, grids = self.merge, self.patch_size, [], []
        for video in videos:
            frames, (rows, columns) = len(video) // self.temporal_patch_size, (side // size for side in video.shape[2:])
            blocks = video.reshape(frames, -1, 3, rows // m, m, size, columns // m, m, size)
            patches.append(blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(frames * rows * columns, -1))
            grids.append((frames, rows, columns))
        return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids, device=videos[0].device)}

    def pictures(self, inputs: Inputs) -> list[tuple[Tensor, int, int]]:
        m, size = self.merge, self.patch_size
        pictures = []
        for one, (frames, rows, columns) in zip(self.split(inputs), _grids(inputs), strict=True):
            shape = (frames, rows // m, columns // m, m, m, 3, self.temporal_patch_size, size, size)
            frame = one["pixel_values"].reshape(shape)[0, ..., 0, :, :]
            pixels = frame.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * size, columns * size)
            pictures.append((pixels, rows // m, columns // m))
        return pictures

    # ── Running ──

    def embed(self, planned: Planned) -> tuple[Tensor, Context]:
        # A convolution whose stride is its kernel: one matrix product, which every runtime is good at.
        projection = self._visual.patch_embed.proj
        pixels = planned["pixel_values"].to(projection.weight.dtype)
        stream = F.linear(pixels, projection.weight.flatten(1), projection.bias)
        if self._side:
            places = self._visual.pos_embed(planned["place_index"]) * planned["place_weight"][..., None]
            stream = stream + places.sum(1).to(stream.dtype)
        cosine, sine = rotary(planned["position_ids"], self._head_dim, self._theta)
        segments = {
            name: Segments.of(planned[f"{name}_index"], planned[f"{name}_inverse"], stream.dtype)
            for name in ("frame", "window")
            if f"{name}_index" in planned
        }
        return stream, Context(cosine, sine, segments.get("frame"), segments.get("window"))

    def visual_tokens(self, activations: Activations, planned: Planned) -> Tensor:
        parts = [self._visual.merger(activations.last)]
        # In the order of the blocks, whatever order the configuration lists them in.
        for place, block in sorted(enumerate(self.tapped), key=lambda pair: pair[1]):
            parts.append(self._visual.deepstack_merger_list[place](activations.taps[block]))
        return self._per_image(torch.cat(parts, dim=-1), planned)

    def attention_prior(
        self, activations: Activations, context: Context, planned: Planned, kind: Prior, block: int = -1
    ) -> Tensor:
        chosen, query, key, value = self._attending(activations, context, block)
        frames, scale = context.frames, chosen.head_dim**-0.5
        if frames is None:
            bias = torch.zeros_like(key[:, 0, 0], dtype=torch.float32)[None]
            weight = torch.ones_like(bias) / bias.shape[1]
            received = received_attention(query[None], key[None], weight, bias, scale)[0]
        else:
            rows, columns = (
                F.embedding(frames.index, part.flatten(1)).unflatten(2, part.shape[1:]) for part in (query, key)
            )
            bias = frames.mask[:, 0, 0].float()
            valid = (bias == 0).float()
            weight = valid / valid.sum(1, keepdim=True)
            received = received_attention(rows, columns, weight, bias, scale).flatten().index_select(0, frames.inverse)
        prior = received.view(-1, self.merge**2).mean(dim=1)
        if kind == "value":
            prior = prior * value.float().flatten(1).norm(dim=-1).view(-1, self.merge**2).mean(dim=1)
        return self._per_image(prior[:, None], planned)[..., 0]

    def attention_keys(self, activations: Activations, context: Context, planned: Planned) -> Tensor:
        _, _, key, _ = self._attending(activations, context, -1)
        return self._per_image(key.mean(dim=1).unflatten(0, (-1, self.merge**2)).mean(dim=1), planned)

    def token_grids(self, planned: Planned) -> list[tuple[int, int]]:
        grids, start = [], 0
        everything = torch.tensor([len(planned["position_ids"]) // self.merge**2])
        for count in planned.get("token_counts", everything).tolist():
            patches = count * self.merge**2
            columns = int(planned["position_ids"][start : start + patches, 1].max()) // self.merge + 1
            # The frames of a video are rows below rows.
            grids.append((count // columns, columns))
            start += patches
        return grids

    def _per_image(self, packed: Tensor, planned: Planned) -> Tensor:
        """Values of all visual tokens [N, E] as rows of images; one row without `token_index`."""
        return F.embedding(planned["token_index"], packed) if "token_index" in planned else packed[None]

    def readers(self) -> list[nn.Module]:
        return [self._visual.merger, *getattr(self._visual, "deepstack_merger_list", ())]

    def project(self, tokens: Tensor) -> Tensor:
        return tokens


def _grids(inputs: Mapping[str, Any]) -> list[packing.Grid]:
    return [(int(t), int(h), int(w)) for t, h, w in inputs["image_grid_thw"].tolist()]

"""LLaVA-NeXT: an overview tile and a grid of tiles per image, each through the same CLIP tower.

Two ways to lay the tiles' tokens out, chosen by ``config.image_packing``:

- ``anyres`` (the model's own): tokens of the padding are cut away and every row of the grid ends in a learned newline
  embedding. Selection chooses among the image's tokens; newlines of a selected image are left out.
- ``tiles``: all tokens of all tiles, no newline: 5 x 576 = 2880 for a 2 x 2 grid, the setting that token pruning papers
  report. The model's own ``forward`` does not know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from infoprune_export.errors import InfopruneError
from infoprune_export.models.attention import Context
from infoprune_export.models.boundaries import TOKENS, mark
from infoprune_export.models.clip import LlavaTower
from infoprune_export.models.tower import Activations, Form, Inputs, Layout, Planned, Prior, image_noise, require

PACKINGS = ("anyres", "tiles")
_NEWLINE = -1


class LlavaNextTower(LlavaTower):
    """CLIP on tiles, the projector, and the packing of an image's tiles into one row of tokens."""

    ragged = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.packing = getattr(model.config, "image_packing", "anyres")
        if self.packing not in PACKINGS:
            raise InfopruneError(f"image_packing {self.packing!r}: supported are {', '.join(PACKINGS)}")
        self._pinpoints = [list(point) for point in model.config.image_grid_pinpoints]
        self._model = model.model

    # ── Planning ──

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        require(inputs, "pixel_values", "image_sizes")
        shape = tuple(inputs["pixel_values"].shape)
        expected = (3, self.image_size, self.image_size)
        if len(shape) != 5 or shape[2:] != expected or shape[0] != len(inputs["image_sizes"]):
            raise InfopruneError(
                f"pixel_values {list(shape)} with {len(inputs['image_sizes'])} image sizes: this tower takes "
                f"[images, tiles, {', '.join(map(str, expected))}]; let the model's own processor cut the tiles"
            )
        if (needed := max(map(self._tiles, inputs["image_sizes"].tolist()))) > shape[1]:
            raise InfopruneError(f"pixel_values has {shape[1]} tiles per image, image_sizes stands for {needed}")

    def _grid(self, size: list[int]) -> tuple[int, int]:
        """Rows and columns of tiles for an image of (height, width) pixels."""
        rows, columns = get_anyres_image_grid_shape(size, self._pinpoints, self.image_size)
        return int(rows), int(columns)

    def _tiles(self, size: list[int]) -> int:
        rows, columns = self._grid(size)
        return 1 + rows * columns

    def _order(self, size: list[int]) -> Tensor:
        """The image's tokens in the language model's order, int64 [N]: place among its tiles' tokens; -1, newline."""
        rows, columns = self._grid(size)
        overview = torch.arange(self.side**2)
        tiles = torch.arange(rows * columns * self.side**2) + len(overview)
        if self.packing == "tiles":
            return torch.cat([overview, tiles])
        plane = tiles.view(rows, columns, self.side, self.side).transpose(1, 2).reshape(1, rows * self.side, -1)
        plane = unpad_image(plane, size)[0]
        newlines = torch.full((len(plane), 1), _NEWLINE)
        return torch.cat([overview, torch.cat([plane, newlines], dim=1).flatten()])

    def layouts(self, inputs: Inputs) -> list[Layout]:
        lengths = [len(self._order(size)) for size in inputs["image_sizes"].tolist()]
        return [Layout(torch.arange(length)[None], length) for length in lengths]

    def plan(self, inputs: Inputs, form: Form) -> dict[str, Tensor]:
        sizes = inputs["image_sizes"].tolist()
        pixels = [tiles[: self._tiles(size)] for tiles, size in zip(inputs["pixel_values"], sizes, strict=True)]
        orders, start = [], 0
        newline = sum(map(len, pixels)) * self.side**2
        for tiles, size in zip(pixels, sizes, strict=True):
            order = self._order(size)
            orders.append(torch.where(order == _NEWLINE, newline, order + start))
            start += len(tiles) * self.side**2
        planned, device = {"pixel_values": torch.cat(pixels)}, inputs["pixel_values"].device
        if not form.selecting:
            return {**planned, "token_order": torch.cat(orders).to(device)}
        # Newlines are no candidates.
        places = [(order != newline).nonzero().flatten() for order in orders]
        pairs = zip(orders, places, strict=True)
        packed = {"token_order": pad_sequence([order[place] for order, place in pairs], batch_first=True)}
        packed["token_places"] = pad_sequence(places, batch_first=True)
        packed["token_counts"] = torch.tensor([len(place) for place in places])
        return {**planned, **{name: value.to(device) for name, value in packed.items()}}

    def dynamic_shapes(self, form: Form) -> dict[str, dict[int, Any]]:
        pixels, tokens = {0: torch.export.Dim("tiles", min=2)}, torch.export.Dim("tokens", min=2)
        if not form.selecting:
            return {"pixel_values": pixels, "token_order": {0: tokens}}
        images = {0: torch.export.Dim("images", min=1)} if form.several else {}
        packed = {"token_order": {**images, 1: tokens}, "token_places": {**images, 1: tokens}, "token_counts": images}
        return {"pixel_values": pixels, **packed}

    def example_inputs(self, images: int, generator: torch.Generator) -> dict[str, Tensor]:
        # One image fills its grid, the next is padded at the sides, the next above and below.
        height, width = max(self._pinpoints)
        shapes = [(height, width), (height, max(1, width * 3 // 5)), (max(1, height * 3 // 5), width)]
        sizes = [list(shapes[i % len(shapes)]) for i in range(images)]
        tiles = max(map(self._tiles, sizes))
        noise = image_noise(images * tiles, self.image_size, self.image_size, generator)
        return {"pixel_values": noise.unflatten(0, (images, tiles)), "image_sizes": torch.tensor(sizes)}

    def pictures(self, inputs: Inputs) -> list[tuple[Tensor, int, int]]:
        # The overview tile, whose tokens come first.
        return [(tiles[0], self.side, self.side) for tiles in inputs["pixel_values"]]

    # ── Running ──

    def visual_tokens(self, activations: Activations, planned: Planned) -> Tensor:
        return self._ordered(super().visual_tokens(activations, planned), planned)

    def attention_prior(
        self, activations: Activations, context: Context, planned: Planned, kind: Prior, block: int = -1
    ) -> Tensor:
        prior = super().attention_prior(activations, context, planned, kind, block)
        return self._ordered(prior[..., None], planned)[..., 0]

    def attention_keys(self, activations: Activations, context: Context, planned: Planned) -> Tensor:
        return self._ordered(super().attention_keys(activations, context, planned), planned)

    def token_grids(self, planned: Planned) -> list[tuple[int, int]]:
        return [(1, int(count)) for count in planned["token_counts"]]

    def _ordered(self, per_tile: Tensor, planned: Planned) -> Tensor:
        """Values of all tiles' tokens [tiles, side^2, E] as rows of images [B, N, E]."""
        return F.embedding(planned["token_order"], per_tile.flatten(0, 1))

    def assemble(self, activations: Activations, planned: Planned) -> Tensor:
        tokens = self.project(mark(super().visual_tokens(activations, planned), TOKENS)).flatten(0, 1)
        newline = self._model.image_newline[None].to(tokens.dtype)
        return torch.cat([tokens, newline])[planned["token_order"]][None]

    def kept_positions(self, kept: Tensor, planned: Planned) -> Tensor:
        return planned["token_places"].gather(1, kept)

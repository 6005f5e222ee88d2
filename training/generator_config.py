"""Configuration of a run that trains the generator of :mod:`finelip_fast.training.generator`."""

from __future__ import annotations

from dataclasses import dataclass

from finelip_fast.training.fields import check_fields, option, require

GROUPS = 8  # of channels that a normalization treats as one
SQUARE = 2  # side in pixels of the squares that the U-Net sees as one position


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """A run; each field is an option of the command."""

    out: str = option("folder of the run")
    context_length: int = option("longest caption in tokens", 256, least=3)
    checkpoint: str = option("checkpoint whose text encoder reads captions; none: the bundled one", "")
    scenes: int = option("scenes of the training split", 409_600, least=1)
    image_size: int = option("side of the pictures in pixels; the U-Net sees squares of 2 x 2 as one place", 64)
    channels: tuple[int, ...] = option(
        "channels of the U-Net at each halving of the places; all but the first look at the text",
        (48, 96, 144),
        least=GROUPS,
        most=1 << 16,
    )
    steps: int = option("optimizer steps", 6_000, least=1)
    batch_size: int = option("scenes of a step", 32, least=1, most=1 << 20)
    learning_rate: float = option("peak learning rate, which falls to zero by a cosine", 4e-4, least=0)
    warmup_steps: int = option("steps of linear warm-up", 200, least=0)
    unconditional: float = option("share of the captions that are left out, for guidance", 0.1, least=0, most=1)
    ema_decay: float = option("decay of the average of the weights, which is what draws", 0.998, least=0, below=1)
    save_every: int = option("steps after which the state is kept", 100, least=1)
    seed: int = option("seed of weights, pictures and noise", 0)
    device: str = option("cpu, cuda, or auto for a GPU if there is one", "auto")

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: A field is invalid, or the side of the pictures cannot be halved as often as the channels require.
        """
        # Imported late, as the command line builds its options from the fields.
        from finelip_fast.datasets.scenes.scenes import MAX_IMAGE_SIZE, MAX_SIZE

        check_fields(self)
        require(self.scenes <= MAX_SIZE, f"scenes of at most {MAX_SIZE}", self.scenes)
        require(16 <= self.image_size <= MAX_IMAGE_SIZE, f"image_size from 16 to {MAX_IMAGE_SIZE}", self.image_size)
        require(bool(self.out), "out, a folder", self.out)
        require(len(self.channels) > 1, "two or more channels", self.channels)
        for count in self.channels:
            require(count % GROUPS == 0, f"channels of multiples of {GROUPS}", count)
        multiple = SQUARE << (len(self.channels) - 1)
        expected = f"image_size a multiple of {multiple}, since {len(self.channels)} channels halve it so often"
        require(self.image_size % multiple == 0, expected, self.image_size)

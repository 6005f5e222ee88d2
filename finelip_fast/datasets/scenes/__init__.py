"""Generated street scenes with long descriptions: their wording, their town and traffic, and how they are drawn."""

from finelip_fast.datasets.scenes.ceiling import Ceiling, ceiling
from finelip_fast.datasets.scenes.content import FAMILY_SIZE, Building, Furniture, Person, Tree, Vehicle
from finelip_fast.datasets.scenes.scenes import SPLITS, VARIANTS, Phrase, Scene, Scenes

__all__ = [
    "FAMILY_SIZE",
    "SPLITS",
    "VARIANTS",
    "Building",
    "Ceiling",
    "Furniture",
    "Person",
    "Phrase",
    "Scene",
    "Scenes",
    "Tree",
    "Vehicle",
    "ceiling",
]

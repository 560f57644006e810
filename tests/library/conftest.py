import guarded
import pytest
from diffusers import DiffusionPipeline


@pytest.fixture
def pipe(folders):
    """A pipeline of random weights that brings a judge along, as guards may need."""
    found = DiffusionPipeline.from_pretrained(guarded.judged(folders["sd1"]))
    found.set_progress_bar_config(disable=True)
    return found

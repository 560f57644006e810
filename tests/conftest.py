import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved random-weight StableDiffusionPipeline."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.build(folder)
    return folder

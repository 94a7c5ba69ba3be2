import pytest

import tiers
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """A group of two processes, with --all of three."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks") / "rendezvous", 3 if tiers.ALL else 2)
    yield ranks
    ranks.close()

import pytest

from ranks import of_session


@pytest.fixture
def ranks():
    return of_session()

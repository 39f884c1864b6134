from tests.flip.data.conftest import folder, original  # noqa: F401

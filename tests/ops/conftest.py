import pytest

from fastlora.ops.backend import backend


@pytest.fixture(params=["torch", "cpp", "triton"])
def path(request, monkeypatch):
    """Each backend in turn; Triton through its interpreter where there is no GPU."""
    monkeypatch.setenv("FASTLORA_BACKEND", request.param)
    try:
        backend("cpu")
    except ValueError as error:
        pytest.skip(str(error))
    return request.param

import pytest

NUM_WORDS = 4000


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of words drawn by a fixed rule: small, and predictable enough to be learned in a few steps."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = ["router", "expert", "dispatch", "combine", "token", "rank", "\n"]
    path.write_text(" ".join(words[(i * i + i // 7) % len(words)] for i in range(NUM_WORDS)))
    return path

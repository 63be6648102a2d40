import pytest
import transformers

from tests.components.stubs import CHAT_TEMPLATE
from tests.pretrained.checkpoints import write_decoder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a small random model with a chat template."""
    folder = tmp_path_factory.mktemp("small")
    write_decoder(folder, "llama", num_hidden_layers=1, max_position_embeddings=1024)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

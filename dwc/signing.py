"""Who made a posterior: Ed25519 signatures of its content, kept in the file.

Keys are PEM files as OpenSSL writes them: `openssl genpkey -algorithm ed25519 -out north.key` and
`openssl pkey -in north.key -pubout -out north.pem`.
"""

import base64
import binascii
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dwc.base.errors import InputError
from dwc.posterior import Posterior

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["TrustedKeys", "sign"]

_ORGANIZATIONS = "organizations"
_NOT_ED25519 = "is not an Ed25519 key; make one with openssl genpkey -algorithm ed25519"
_CONTEXT = b"dwc posterior, content SHA-256: "  # so that the signature means nothing elsewhere


def sign(posterior: Posterior, key: Path) -> Posterior:
    """The same posterior with a signature by a private key; Ed25519 gives the same signature each time."""
    signature = _private_key(key).sign(_message(posterior))
    return replace(posterior, signature=base64.b64encode(signature).decode())


class TrustedKeys:
    """The public keys in a folder, one for each party whose posteriors are accepted.

    `<site>.pem` is a site's, `organizations/<name>.pem` that of an organization, which may also sign consolidated
    posteriors: it vouches for the list of sites in them. No key may stand there under two names.

    Parameters
    ----------
    folder : Path
        The folder; it must hold at least one key.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give a folder of public keys, NAME.pem")
        self.folder = folder
        self.keys: dict[str, Ed25519PublicKey] = {}
        names: dict[bytes, Path] = {}  # by the key itself
        for path in (*sorted(folder.glob("*.pem")), *sorted((folder / _ORGANIZATIONS).glob("*.pem"))):
            key = _public_key(path)
            first = names.setdefault(key.public_bytes_raw(), path)
            if first != path:
                raise InputError(f"{path}: is the same key as {first}; a key stands for one party, remove one of them")
            self.keys[str(path.relative_to(folder).with_suffix(""))] = key
        if not self.keys:
            raise InputError(f"{folder}: holds no public key, NAME.pem; put those of the parties you trust there")

    def signer(self, posterior: Posterior) -> str:
        """The name of the key that signed a posterior; refused if none of these did, or the content has changed."""
        from cryptography.exceptions import InvalidSignature

        if not posterior.signature:
            raise InputError(f"{posterior.name}: is not signed; sign it with dwc posterior sign")
        try:
            signature = base64.b64decode(posterior.signature, validate=True)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{posterior.name}: its signature is not base64; sign it again") from error
        for name, key in self.keys.items():
            try:
                key.verify(signature, _message(posterior))
                return name
            except InvalidSignature:
                continue
        raise InputError(
            f"{posterior.name}: no key in {self.folder} ({', '.join(self.keys)}) made its signature for this content; "
            "do not use it, or add its maker's key"
        )

    def answers_for(self, posterior: Posterior) -> str:
        """The signer's name, as `signer`; a consolidated posterior is refused unless an organization signed it."""
        name = self.signer(posterior)
        if posterior.metadata.get("sites") and not name.startswith(f"{_ORGANIZATIONS}/"):
            raise InputError(
                f"{posterior.name}: is a consolidated file signed by {name}, who can vouch for one site; give the "
                f"sites' own files, or put the key of who made it into {self.folder / _ORGANIZATIONS}"
            )
        return name

    def require(self, posterior: Posterior, name: str) -> None:
        """Refuse a posterior that this party did not sign."""
        if name not in self.keys:
            raise InputError(f"{self.folder / name}.pem: no such key; put {name}'s public key there")
        if (signer := self.signer(posterior)) != name:
            raise InputError(f"{posterior.name}: is signed by {signer}, not by {name}; {name} has to sign its own")


def _message(posterior: Posterior) -> bytes:
    return _CONTEXT + posterior.sha256.encode()


def _private_key(path: Path) -> "Ed25519PrivateKey":
    from cryptography.exceptions import InternalError, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read(path)
    try:
        key = load_pem_private_key(content, password=None)
    except (InternalError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: {_NOT_ED25519}") from error
    except (ValueError, TypeError) as error:  # no key, or an encrypted one
        raise InputError(f"{path}: is not an unencrypted private key in PEM; make one with openssl genpkey") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: {_NOT_ED25519}")
    return key


def _public_key(path: Path) -> "Ed25519PublicKey":
    from cryptography.exceptions import InternalError, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _read(path)
    try:
        key = load_pem_public_key(content)
    except (InternalError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: {_NOT_ED25519}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not a public key in PEM; make one with openssl pkey -pubout") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: {_NOT_ED25519}")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a key file in PEM") from error

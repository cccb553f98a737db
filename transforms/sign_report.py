"""Sign a report, so that whoever reads it can tell who made it and that nobody changed it."""

import base64
import binascii
import hashlib
import hmac
import json
import typing

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from schemas.errors import CampusSyncError
from transforms.secret_key import SecretKey, write_key

_ALGORITHM = "Ed25519"
_CONTEXT = b"campus-sync report\0"  # A signature of anything else is none of a report.


class ReportDamaged(CampusSyncError):
    """A report is not as it was signed, or is none."""


class ReportKey:
    """The key that signs reports: an Ed25519 seed, 32 bytes in base64, read at first use.

    It is in no repr, pickle or error, as a dead letter key.

    Args:
      key_ref: `file:PATH` or `env:NAME`.
    """

    def __init__(self, key_ref: str):
        loss = "reports that it signs are known by it"
        self._secret = SecretKey("report_key", key_ref, loss)

    def __repr__(self) -> str:
        return f"ReportKey({self._secret.ref!r})"

    def make(self) -> bool:
        """Writes a new key to the file that is referred to, unless there is one.

        Returns:
          Whether it was written; never where the reference is to the environment.
        """
        if self._secret.path is None:
            return False
        try:
            write_key(self._secret.path)
        except FileExistsError:
            return False
        return True

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes."""
        return self._private().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def sign(self, report: dict[str, typing.Any]) -> dict[str, typing.Any]:
        """Returns the signed form of a report of plain JSON values."""
        return {
            "report": report,
            "signature": {
                "algorithm": _ALGORITHM,
                "public_key": base64.b64encode(self.public).decode(),
                "value": base64.b64encode(self._private().sign(_message(report))).decode(),
            },
        }

    def name_of(self, campus: str, table: str, record_id: str) -> str:
        """Returns a digest of a record's key, 16 hex digits, that only this key's holder can make:
        record numbers are few enough to be guessed."""
        place = json.dumps([campus, table, record_id], ensure_ascii=False).encode()
        return hmac.new(self._secret.load(), b"record\0" + place, hashlib.sha256).hexdigest()[:16]

    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self._secret.load())


def verify(signed: object) -> tuple[dict[str, typing.Any], bytes]:
    """Returns a signed report's content and the public key that it names.

    The key proves who signed only where it is known by another way.

    Raises:
      ReportDamaged: it is not as it was signed.
    """
    try:
        report, signature = signed["report"], signed["signature"]
        if signature["algorithm"] != _ALGORITHM:
            raise ReportDamaged("the report is signed in an unknown way.")
        public = base64.b64decode(signature["public_key"], validate=True)
        value = base64.b64decode(signature["value"], validate=True)
        Ed25519PublicKey.from_public_bytes(public).verify(value, _message(report))
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise ReportDamaged("this is no signed report.") from None
    except InvalidSignature:
        raise ReportDamaged("the report is not as it was signed.") from None
    return report, public


def fingerprint(public: bytes) -> str:
    """Returns a public key in a form that people compare: 16 hex digits."""
    return hashlib.sha256(public).hexdigest()[:16]


def _message(report: object) -> bytes:
    text = json.dumps(report, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return _CONTEXT + text.encode()

"""Sign a report, so that whoever reads it can tell who made it and that nobody changed it."""

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import stat
import typing

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from schemas.errors import CampusSyncError, ConfigError

_KEY_BYTES = 32
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
        self._ref = key_ref
        self._seed: bytes | None = None

    def __repr__(self) -> str:
        return f"ReportKey({self._ref!r})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_seed": None}

    def make(self) -> bool:
        """Writes a new key to the file that is referred to, unless there is one.

        Returns:
          Whether it was written; never where the reference is to the environment.
        """
        if not self._ref.startswith("file:"):
            return False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            handle = os.open(self._ref.removeprefix("file:"), flags, 0o600)
        except FileExistsError:
            return False
        except OSError as error:
            raise ConfigError(f"{self._ref}: {error.strerror}. Remedy: choose a folder.") from None
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(base64.b64encode(os.urandom(_KEY_BYTES)).decode() + "\n")
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
        return hmac.new(self._load(), b"record\0" + place, hashlib.sha256).hexdigest()[:16]

    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self._load())

    def _load(self) -> bytes:
        if self._seed is None:
            seed = b""
            with contextlib.suppress(binascii.Error, ValueError):
                seed = base64.b64decode(self._read().strip(), validate=True)
            if len(seed) != _KEY_BYTES:
                raise ConfigError(f"{self._ref}: is no key. Remedy: 32 random bytes in base64.")
            self._seed = seed
        return self._seed

    def _read(self) -> str:
        kind, _, name = self._ref.partition(":")
        if kind == "env":
            if name not in os.environ:
                raise ConfigError(f"{self._ref}: the variable is not set. Remedy: export it.")
            return os.environ[name]
        try:
            with pathlib.Path(name).open(encoding="ascii") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & stat.S_IRWXO:
                    raise ConfigError(f"{name}: everybody may read this key. Remedy: chmod 600.")
                return file.read()
        except OSError as error:
            raise ConfigError(
                f"{name}: {error.strerror}. Remedy: (umask 077; openssl rand -base64 32 > {name})."
            ) from None


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

"""Seal refused changes: what they hold is encrypted, what an engineer needs stays readable."""

import base64
import binascii
import collections.abc
import hashlib
import json
import os
import pathlib
import stat

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from schemas.batches import DeadLetter, Reject
from schemas.errors import ConfigError, DeadLetterDamagedError
from schemas.positions import Position

_KEY_BYTES = 32
_NONCE_BYTES = 12
_FORMAT = b"\x01"  # Of `sealed`: format, nonce, ciphertext with tag.


class Sealer:
    """Seals and opens dead letters with the key that a reference names.

    Holds the reference; the key is read at first use, kept in this process only, and is in
    no repr, pickle or error. AES-256-GCM; letter id and reason are authenticated with the
    content, so that neither can be moved to another letter.

    Args:
      key_ref: `file:PATH` or `env:NAME`; the key is 32 bytes in base64.
      base: the folder that a relative PATH starts from.
      random_bytes: source of nonces, cryptographically random.
    """

    def __init__(
        self,
        key_ref: str,
        base: str | pathlib.Path = ".",
        random_bytes: collections.abc.Callable[[int], bytes] = os.urandom,
    ):
        kind, _, name = key_ref.partition(":")
        if kind not in ("file", "env") or not name:
            # A reference that is neither is perhaps the key itself: it is not repeated.
            raise ConfigError(
                "dead_letter_key: is neither `file:PATH` nor `env:NAME`. "
                "Remedy: give a reference to the key, never the key."
            )
        self._ref, self._kind, self._name = key_ref, kind, name
        self._base = pathlib.Path(base)
        self._random_bytes = random_bytes
        self._key: bytes | None = None

    def __repr__(self) -> str:
        return f"Sealer({self._ref!r})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_key": None}

    @property
    def key_id(self) -> str:
        """Names the key without telling it: 16 hex digits of a SHA-256."""
        return hashlib.sha256(b"campus-sync dead letter key\0" + self._load()).hexdigest()[:16]

    def seal(self, reject: Reject, link: str, kind: str = "row") -> DeadLetter:
        """Returns `reject` as a letter of `link`; the id repeats, the ciphertext does not."""
        letter_id = letter_id_of(link, reject.src_table, reject.position, reject.op, kind)
        nonce = self._random_bytes(_NONCE_BYTES)
        content = json.dumps({**_in_the_open(reject), "row": reject.row}, sort_keys=True).encode()
        box = AESGCM(self._load()).encrypt(nonce, content, _bound(letter_id, reject.reason))
        return DeadLetter(
            letter_id=letter_id,
            key_id=self.key_id,
            sealed=_FORMAT + nonce + box,
            **_in_the_open(reject),
        )

    def open(self, letter: DeadLetter) -> Reject:
        """Returns what `seal` was given.

        Raises:
          ConfigError: the letter was sealed with another key; both are named by their ids.
          DeadLetterDamagedError: the letter is not as it was sealed.
        """
        if letter.key_id != self.key_id:
            raise ConfigError(
                f"{self._ref}: is key {self.key_id}, the dead letter needs key {letter.key_id}. "
                "Remedy: point dead_letter_key to the key that it was sealed with."
            )
        sealed = bytes(letter.sealed)
        if sealed[:1] != _FORMAT:
            raise DeadLetterDamagedError
        nonce, box = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            text = AESGCM(self._load()).decrypt(nonce, box, _bound(letter.letter_id, letter.reason))
        except (InvalidTag, ValueError):
            raise DeadLetterDamagedError from None
        content = json.loads(text)
        position = Position(content.pop("lsn"), content.pop("seq"))
        reject = Reject(position=position, **content)
        if any(getattr(letter, name) != value for name, value in _in_the_open(reject).items()):
            raise DeadLetterDamagedError
        return reject

    def _load(self) -> bytes:
        if self._key is None:
            self._key = _decode(self._read(), self._ref)
        return self._key

    def _read(self) -> str:
        if self._kind == "env":
            if self._name not in os.environ:
                raise ConfigError(
                    f"{self._ref}: the variable is not set. Remedy: "
                    f'export {self._name}="$(head -c {_KEY_BYTES} /dev/urandom | base64)", '
                    "and keep the key: without it no dead letter can be opened."
                )
            return os.environ[self._name]
        path = self._base / self._name
        try:
            with path.open(encoding="ascii") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & stat.S_IRWXO:
                    raise ConfigError(
                        f"{path}: everybody may read this key. Remedy: chmod 600 {path}"
                    )
                return file.read()
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such key file. Remedy: "
                f"(umask 077; head -c {_KEY_BYTES} /dev/urandom | base64 > {path}), "
                "and keep a copy: without it no dead letter can be opened."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror}. Remedy: let the user of the sync job read it."
            ) from None
        except UnicodeDecodeError:
            raise _not_a_key(self._ref) from None


def letter_id_of(link: str, src_table: str, position: Position, op: int, kind: str = "row") -> str:
    """Returns the letter's id, 64 hex digits: the same change refused again has the same."""
    place = [link, src_table, *position, int(op), kind]
    return hashlib.sha256(json.dumps(place).encode()).hexdigest()


def make_key(path: str | pathlib.Path) -> None:
    """Writes a new random key to `path`, readable by its owner only.

    Raises:
      ConfigError: there is a file already, which is never overwritten, or no such folder.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path}: exists already. Remedy: use it, or choose another name; "
            "letters sealed with it can be opened with no other key."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}. Remedy: choose a folder to write to."
        ) from None
    with os.fdopen(handle, "w", encoding="ascii") as file:
        os.fchmod(handle, 0o600)
        file.write(base64.b64encode(os.urandom(_KEY_BYTES)).decode() + "\n")
        file.flush()
        os.fsync(handle)


def _in_the_open(reject: Reject) -> dict:
    lsn, seq = reject.position
    return {
        "src_table": reject.src_table,
        "lsn": lsn,
        "seq": seq,
        "op": int(reject.op),
        "commit_us": reject.commit_us,
        "reason": reject.reason,
        "column": reject.column,
    }


def _bound(letter_id: str, reason: str) -> bytes:
    return (letter_id + reason).encode()  # The id is 64 digits, so the border is plain.


def _decode(text: str, ref: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise _not_a_key(ref) from None
    if len(key) != _KEY_BYTES:
        raise _not_a_key(ref)
    return key


def _not_a_key(ref: str) -> ConfigError:
    return ConfigError(
        f"{ref}: does not hold {_KEY_BYTES} bytes in base64. "
        f"Remedy: make a key with `head -c {_KEY_BYTES} /dev/urandom | base64`."
    )

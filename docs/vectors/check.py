#!/usr/bin/env python3
"""Recomputes the golden vectors that rest on cryptography or arithmetic, from docs/PROTOCOL.md alone.

Needs PyPI's `cryptography`. Prints one line for each file and ends with status 1 if anything differs.
"""

import hashlib
import hmac
import json
import pathlib
import struct
import sys

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

HERE = pathlib.Path(__file__).parent
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
PROLOGUE = b"dim wire: host initiates, worker responds"
MAGIC = bytes.fromhex("d144494d0d0a1a0a")
MAX_BODY = 65519


def load(name):
    return json.loads((HERE / name).read_text())


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


# --- section 2: keys and codes ---------------------------------------------------------------------------

def mark(key, nonce, salt):
    return hmac.digest(key, b"dim key mark v2" + nonce + salt, "sha256")[:8]


def check_character(characters):
    total, factor = 0, 2
    for c in reversed(characters):
        a = factor * ALPHABET.index(c)
        total += a // 32 + a % 32
        factor = 3 - factor
    return ALPHABET[(32 - total % 32) % 32]


def parse_code(typed):
    """The 20 characters, or the rule that the text breaks."""
    text = typed.strip().replace(" ", "").replace("-", "").upper()
    text = text.replace("O", "0").replace("I", "1").replace("L", "1")
    if any(c not in ALPHABET for c in text):
        return "character"
    if len(text) != 21:
        return "length"
    return text[:20] if check_character(text[:20]) == text[20] else "check"


def check_keys():
    vectors, n = load("keys.json"), 0
    for v in vectors["keys"]:
        key, nonce, salt = (bytes.fromhex(v[name]) for name in ("key", "nonce", "salt"))
        assert sha256(b"dim key id v1", key)[:8].hex() == v["id"], v
        assert mark(key, nonce, salt).hex() == v["mark"], v
        n += 1
    for v in vectors["codes"]:
        c = v["characters"]
        assert check_character(c) == v["check"], v
        assert v["shown"] == f"{c[:5]}-{c[5:10]}-{c[10:15]}-{c[15:]}{v['check']}", v
        assert sha256(b"dim pairing v1", c.encode()).hex() == v["pairing_key"], v
        for typed in v["typed"]:
            assert parse_code(typed) == c, (v, typed)
            n += 1
    for v in vectors["bad_codes"]:
        assert parse_code(v["typed"]) == v["rule"], v
        n += 1
    return n


# --- section 3.3: Noise ----------------------------------------------------------------------------------

def seal(key, n, ad, plain):
    return ChaCha20Poly1305(key).encrypt(bytes(4) + struct.pack("<Q", n), plain, ad)


def unseal(key, n, ad, sealed):
    return ChaCha20Poly1305(key).decrypt(bytes(4) + struct.pack("<Q", n), sealed, ad)


def hkdf(ck, data):
    t = hmac.digest(ck, data, "sha256")
    o1 = hmac.digest(t, b"\1", "sha256")
    o2 = hmac.digest(t, o1 + b"\2", "sha256")
    o3 = hmac.digest(t, o2 + b"\3", "sha256")
    return o1, o2, o3


def curve(secret, public):
    private = X25519PrivateKey.from_private_bytes(secret)
    return private.exchange(X25519PublicKey.from_public_bytes(public))


def public_of(secret):
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


class Noise:
    """The symmetric state, with a trace of what section 3.3 names."""

    def __init__(self, greeting, preamble):
        self.h = self.ck = sha256(b"Noise_NNpsk0_25519_ChaChaPoly_SHA256")
        self.k = None
        prologue = PROLOGUE + greeting + preamble
        self.trace = {"prologue": prologue.hex(), "ck_at_first": self.ck.hex()}
        self.mix_hash(prologue)
        self.trace["h_after_prologue"] = self.h.hex()

    def mix_hash(self, data):
        self.h = sha256(self.h, data)

    def mix_key(self, data):
        self.ck, self.k, _ = hkdf(self.ck, data)

    def mix_psk(self, psk):
        self.ck, t, self.k = hkdf(self.ck, psk)
        self.mix_hash(t)
        self.note("after_psk")

    def seal_and_mix(self, plain):
        sealed = seal(self.k, 0, self.h, plain)
        self.mix_hash(sealed)
        return sealed

    def note(self, name):
        self.trace[name] = {"h": self.h.hex(), "ck": self.ck.hex(), "k": self.k.hex()}


def handshake(v, host_versions=(2, 2), worker_versions=(2, 2)):
    """Greeting, both flights, both transport keys and the trace, from nothing but the secrets."""
    psk, purpose = bytes.fromhex(v["psk"]), v["purpose"]
    e, f = bytes.fromhex(v["host_ephemeral"]), bytes.fromhex(v["worker_ephemeral"])
    nonce, salt = bytes.fromhex(v["worker_nonce"]), bytes.fromhex(v["host_salt"])
    greeting = MAGIC + struct.pack("<HH4x", *worker_versions) + nonce
    named = bytes(16) if purpose else salt + mark(psk, nonce, salt)
    preamble = MAGIC + struct.pack("<HHB3x", *host_versions, purpose) + named
    noise = Noise(greeting, preamble)
    noise.mix_psk(psk)
    noise.mix_hash(public_of(e))
    noise.mix_key(public_of(e))
    noise.note("after_host_e")
    message_1 = public_of(e) + noise.seal_and_mix(b"")
    noise.trace["h_after_message_1"] = noise.h.hex()
    version = min(host_versions[1], worker_versions[1])
    clear = MAGIC + struct.pack("<HHBxH8x", *worker_versions, 0, version)
    noise.mix_hash(public_of(f))
    noise.mix_key(public_of(f))
    noise.note("after_worker_e")
    shared = curve(e, public_of(f))
    assert shared == curve(f, public_of(e))
    noise.trace["shared_secret"] = shared.hex()
    noise.mix_key(shared)
    noise.note("after_ee")
    message_2 = public_of(f) + noise.seal_and_mix(clear)
    host_key, worker_key, _ = hkdf(noise.ck, b"")
    noise.trace.update(handshake_hash=noise.h.hex(), host_key=host_key.hex(), worker_key=worker_key.hex())
    first = preamble + struct.pack("<H", 48) + message_1
    answer = clear + struct.pack("<H", 72) + message_2
    return greeting, first, answer, host_key, worker_key, noise.trace


def check_noise():
    vectors, n = load("noise.json"), 0
    for v in vectors["cases"]:
        greeting, first, answer, _, _, trace = handshake(v, v["host_versions"], v["worker_versions"])
        assert greeting.hex() == v["greeting"], v["name"]
        assert first.hex() == v["first_flight"], v["name"]
        assert answer.hex() == v["answer"], v["name"]
        assert trace == v["trace"], v["name"]
        n += 1
    plain = vectors["cases"][-1]
    for v in vectors["refused_by_worker"]:
        rule, answer = worker_refuses(plain, bytes.fromhex(v["bytes"]))
        assert (rule, answer.hex()) == (v["rule"], v["answer"]), (v["name"], rule)
        n += 1
    for v in vectors["refused_by_host"]:
        rule = host_refuses(plain, bytes.fromhex(v["bytes"]))
        assert rule == v["rule"], (v["name"], rule)
        n += 1
    return n


def worker_refuses(case, flight, versions=(2, 2)):
    """Section 3.1 and 3.2, for a worker that knows the case's key: the rule broken and the answer."""
    def status(s):
        return MAGIC + struct.pack("<HHBx2x8x", *versions, s)

    if flight[:8] != MAGIC[: len(flight[:8])]:
        return "bad-magic", b""
    low, high, purpose = struct.unpack("<HHB", flight[8:13])
    salt, psk = flight[16:24], bytes.fromhex(case["psk"])
    if low > high or purpose > 1 or flight[13:16] != bytes(3) or (purpose and flight[16:32] != bytes(16)):
        return "bad-preamble", b""
    if high < versions[0] or low > versions[1]:
        return "version", status(1)
    if struct.unpack("<H", flight[32:34])[0] != 48:
        return "noise-length", b""
    if flight[24:32] != mark(psk, bytes.fromhex(case["worker_nonce"]), salt):
        return "key", status(2)
    noise = Noise(bytes.fromhex(case["greeting"]), flight[:32])
    noise.mix_psk(psk)
    noise.mix_hash(flight[34:66])
    noise.mix_key(flight[34:66])
    try:
        unseal(noise.k, 0, noise.h, flight[66:82])
    except InvalidTag:
        return "key", status(2)
    try:
        curve(bytes.fromhex(case["worker_ephemeral"]), flight[34:66])
    except ValueError:  # `cryptography` refuses the all-zero result
        return "zero-dh", b""
    return None, b""


def host_refuses(case, said, versions=(2, 2)):
    """Section 3.1 and 3.2, for the case's host: the rule that a worker's bytes break."""
    greeting, answer = said[:32], said[32:]
    if greeting[:8] != MAGIC:
        return "bad-magic"
    low, high, zero = struct.unpack("<HHI", greeting[8:16])
    if low > high or zero:
        return "bad-greeting"
    if low > versions[1] or high < versions[0]:
        return "version"
    if answer[:8] != MAGIC:
        return "bad-magic"
    status, zero, chosen = struct.unpack("<BBH", answer[12:16])
    if answer[8:12] != greeting[8:12] or zero or answer[16:24] != bytes(8):
        return "bad-answer"
    if status:
        if chosen or status > 4:
            return "bad-answer"
        return ["version", "key", "no-pairing", "crowded"][status - 1]
    if chosen != min(high, versions[1]) or chosen < max(low, versions[0]):
        return "bad-answer"
    if struct.unpack("<H", answer[24:26])[0] != 72:
        return "noise-length"
    _, first, _, _, _, _ = handshake({**case, "worker_nonce": greeting[16:].hex()})
    noise = Noise(greeting, first[:32])
    noise.mix_psk(bytes.fromhex(case["psk"]))
    noise.mix_hash(first[34:66])
    noise.mix_key(first[34:66])
    noise.mix_hash(first[66:82])
    noise.mix_hash(answer[26:58])
    noise.mix_key(answer[26:58])
    try:
        noise.mix_key(curve(bytes.fromhex(case["host_ephemeral"]), answer[26:58]))
    except ValueError:
        return "zero-dh"
    try:
        sealed = unseal(noise.k, 0, noise.h, answer[58:98])
    except InvalidTag:
        return "key"
    return None if sealed == answer[:24] else "answer-changed"


# --- section 4: frames -----------------------------------------------------------------------------------

class Sealer:
    def __init__(self, key):
        self.key, self.n = key, 0

    def frame(self, body):
        sealed = seal(self.key, self.n, b"", body)
        self.n += 1
        return struct.pack("<H", len(sealed)) + sealed

    def message(self, message):
        return b"".join(self.frame(message[i:i + MAX_BODY]) for i in range(0, len(message), MAX_BODY))


def open_stream(key, limit, stream):
    """How many messages come out, and the rule that ends it."""
    n = messages = received = 0
    length = None
    while len(stream) >= 2:
        (size,) = struct.unpack("<H", stream[:2])
        if length is None:
            if size < 8 + 16:
                return messages, "frame-length"
            if size - 16 > limit:
                return messages, "too-long"
        elif size != min(length - received, MAX_BODY) + 16:
            return messages, "frame-length"
        if len(stream) < 2 + size:
            break
        try:
            body = unseal(key, n, b"", stream[2:2 + size])
        except InvalidTag:
            return messages, "bad-tag"
        n, stream = n + 1, stream[2 + size:]
        if length is None:
            (length,) = struct.unpack("<I", body[4:8])
            if length > limit:
                return messages, "too-long"
            if len(body) != min(length, MAX_BODY):
                return messages, "frame-length"
        received += len(body)
        if received == length:
            messages, received, length = messages + 1, 0, None
    return messages, None


def filled(message):
    head = bytes.fromhex(message["head"])
    return head + bytes((31 * i + 7) % 256 for i in range(8, message["length"]))


def check_frames():
    vectors, n = load("frames.json"), 0
    key = bytes.fromhex(vectors["key"])
    for v in vectors["streams"]:
        sealer = Sealer(key)
        stream = b"".join(sealer.message(filled(m)) for m in v["messages"])
        assert len(stream) == v["stream_length"] and sha256(stream).hex() == v["stream_sha256"], v
        assert v.get("stream", stream.hex()) == stream.hex(), v
        assert open_stream(key, 200_000, stream) == (len(v["messages"]), None), v
        n += 1
    both = filled({"head": struct.pack("<II", 0x24, 70_000).hex(), "length": 70_000})
    both += filled({"head": struct.pack("<II", 0x24, 8).hex(), "length": 8})
    for v in vectors["refused"]:
        if "stream" in v:
            stream = bytes.fromhex(v["stream"])
        else:
            sealer = Sealer(key)
            stream = b"".join(sealer.frame(both[a:b]) for a, b in v["frames"]["ranges"])
        assert open_stream(key, v["limit"], stream) == (v["messages_before"], v["rule"]), v["name"]
        n += 1
    return n


def check_transcripts():
    n = 0
    for v in load("transcripts.json"):
        greeting, first, answer, host_key, worker_key, _ = handshake(v)
        assert greeting.hex() == v["greeting"], v["name"]
        assert (first.hex(), answer.hex()) == (v["first_flight"], v["answer"]), v["name"]
        sealers = {"host": Sealer(host_key), "worker": Sealer(worker_key)}
        for m in v["messages"]:
            plain = bytes.fromhex(m["plain"])
            assert struct.unpack("<I", plain[4:8])[0] == len(plain), m
            assert sealers[m["from"]].message(plain).hex() == m["wire"], (v["name"], m)
            n += 1
    return n


def main():
    failed = False
    for check in (check_keys, check_noise, check_frames, check_transcripts):
        name = check.__name__.removeprefix("check_") + ".json"
        try:
            print(f"{name}: {check()} vectors agree")
        except AssertionError as difference:
            failed = True
            print(f"{name}: DIFFERS: {difference}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

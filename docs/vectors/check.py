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


# --- section 5: messages, read as the tables have them -----------------------------------------------------

class Broken(Exception):
    """A rule of section 11.1."""


class Fields:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        if self.at + n > len(self.data):
            raise Broken("truncated")
        self.at += n
        return self.data[self.at - n:self.at]

    def int(self, n):
        return int.from_bytes(self.take(n), "little")

    def zeros(self, n):
        if any(self.take(n)):
            raise Broken("reserved-not-zero")

    def one_of(self, n, allowed):
        value = self.int(n)
        if value not in allowed:
            raise Broken("bad-value")
        return value

    def known(self, n):
        value = self.int(n)
        return None if value == 256 ** n - 1 else value

    def string(self, most):
        length = self.int(2)
        if length > most:
            raise Broken("string-too-long")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise Broken("not-utf8") from None

    def rest(self):
        return self.take(len(self.data) - self.at)

    def end(self):
        if self.at < len(self.data):
            raise Broken("trailing-bytes")


def read_parts(f, n):
    if n > 128:
        raise Broken("bad-value")
    parts = []
    for _ in range(n):
        kind, rounds = f.int(1), f.int(1)
        f.zeros(2)
        values = f.int(4)
        odd = kind == 1 and values % 2
        if kind not in (1, 2, 3) or rounds > (kind == 2) or values == 0 or odd:
            raise Broken("bad-value")
        parts.append([kind, rounds, values])
    return parts


def read_terms(f):
    t = {"version": f.int(2), "dtypes": f.one_of(1, range(4)), "role": f.one_of(1, range(4)), "features": f.int(4),
         "instance": f.int(8), "n_blocks": f.int(4), "first_block": f.int(4), "last_block": f.int(4),
         "n_ctx": f.int(4), "max_rows": f.int(4), "max_sessions": f.int(4), "max_in_flight": f.int(4),
         "take_back": f.int(4), "engine": f.one_of(1, range(3)), "unit": f.one_of(1, range(4))}
    f.zeros(2)
    t.update(budget_mib=f.known(4), measured_rows=f.int(4), measured_us=f.int(4))
    t.update((name, f.take(32).hex()) for name in ("model", "slice", "params", "input", "output"))
    tokens, n_in, n_out = f.one_of(1, range(2)), f.int(1), f.int(1)
    f.zeros(5)
    t["shape"] = {"tokens": bool(tokens), "input": read_parts(f, n_in), "output": read_parts(f, n_out)}
    t.update(arch=f.string(32), software=f.string(64), name=f.string(64))
    f.zeros(2)
    return t


def read_fault(f, code):
    fault = {"code": code, "step": f.int(4) or None, "session": f.known(4), "block": f.known(4), "count": f.int(4)}
    return {**fault, "text": f.string(1000)}


def row_bytes(parts, row_format):
    small = lambda kind, rounds: kind == 1 or (row_format == 1 and kind == 2 and rounds)
    return sum(values * (2 if small(kind, rounds) else 4) for kind, rounds, values in parts)


def read_rows(f, row_format, n_rows, parts):
    if f.at + n_rows * row_bytes(parts, row_format) > len(f.data):
        raise Broken("truncated")
    return f.take(n_rows * row_bytes(parts, row_format)).hex()


def read_step(f, a, b, shape):
    row_format, exact = a & ~0x10, bool(a & 0x10)
    if row_format not in (1, 2):
        raise Broken("bad-value")
    v = {"step": f.int(4), "n_rows": f.int(4), "row_format": row_format, "exact": exact, "spans": [], "tokens": []}
    for _ in range(b):
        v["spans"].append([f.int(4), f.int(4), f.int(4)])
        f.zeros(4)
    if shape["tokens"]:
        ids = f.take(4 * v["n_rows"])
        v["tokens"] = list(struct.unpack(f"<{v['n_rows']}i", ids))
        f.zeros(4 * (v["n_rows"] % 2))
    return {**v, "rows": read_rows(f, row_format, v["n_rows"], shape["input"])}


def read_done(f, a, shape):
    if a not in (1, 2):
        raise Broken("bad-value")
    v = {"step": f.int(4), "n_rows": f.int(4), "row_format": a, "compute_us": f.int(4), "wait_us": f.int(4)}
    v["began_us"] = f.int(8)
    return {**v, "rows": read_rows(f, a, v["n_rows"], shape["output"])}


def read_failed(f, a, b):
    fault = read_fault(f, b)
    empty = {"code": 0, "step": fault["step"], "session": None, "block": None, "count": 0, "text": ""}
    if a > 1:
        raise Broken("bad-value")
    if a and fault != empty:
        raise Broken("reserved-not-zero")
    return {"void": bool(a), **fault}


def read_heartbeat(f):
    v = {"state": f.one_of(1, range(4)), "temperature": f.one_of(1, range(5))}
    v["battery"] = f.one_of(1, [*range(101), 255])
    v["battery"] = None if v["battery"] == 255 else v["battery"]
    f.zeros(1)
    v.update(free_mib=f.known(4), step=f.int(4), pause_in_s=f.known(2))
    f.zeros(2)
    return v


def read_push_offer(f, n):
    if not 1 <= n <= 64:
        raise Broken("bad-value")
    begin = f.at
    v = {"model": f.take(32).hex(), "slice": f.take(32).hex(), "first_block": f.int(4), "last_block": f.int(4)}
    v["items"] = []
    for _ in range(n):
        item = {"kind": f.one_of(1, (1, 2, 3, 4, 5, 16)), "index": f.int(1)}
        f.zeros(6)
        v["items"].append({**item, "size": f.int(8), "sha256": f.take(32).hex()})
    v["push_id"] = sha256(f.data[begin:f.at]).hex()
    return {**v, "name": f.string(64)}


def read_push_data(f, item):
    v = {"item": item, "offset": f.int(8), "bytes": f.rest().hex()}
    if not 2 <= len(v["bytes"]) <= 2 * 262_144:
        raise Broken("bad-value")
    return v


REASONS = {*range(1, 18), *range(32, 38)}


def one_of(value, allowed):
    if value not in allowed:
        raise Broken("bad-value")
    return value


def padded(f, fields):
    f.zeros(4)
    return fields


def stored(f, item):
    fields = {"item": item, "bytes": f.int(8)}
    f.zeros(8)
    return fields


# kind: name, uses a, uses b, reader of (fields, a, b, shape)
KINDS = {
    0x01: ("HELLO", 0, 0, lambda f, a, b, s: read_terms(f)),
    0x02: ("ACCEPT", 0, 0, lambda f, a, b, s: read_terms(f)),
    0x03: ("REFUSE", 0, 1, lambda f, a, b, s: {
        "reason": one_of(b, REASONS), "terms": read_terms(f), "text": f.string(1000)}),
    0x04: ("BUSY", 0, 0, lambda f, a, b, s: {"since_ms": f.int(8), "name": f.string(64)}),
    0x05: ("INQUIRE", 0, 0, lambda f, a, b, s: {}),
    0x06: ("OFFER", 0, 0, lambda f, a, b, s: read_terms(f)),
    0x08: ("PAIR_REQUEST", 0, 0, lambda f, a, b, s: {"name": f.string(64), "software": f.string(64)}),
    0x09: ("PAIR_GRANT", 0, 0, lambda f, a, b, s: {
        "key": f.take(32).hex(), "name": f.string(64), "software": f.string(64)}),
    0x0A: ("PAIR_STORED", 0, 0, lambda f, a, b, s: {}),
    0x10: ("STEP", 1, 1, lambda f, a, b, s: read_step(f, a, b, s)),
    0x11: ("STEP_DONE", 1, 0, lambda f, a, b, s: read_done(f, a, s)),
    0x12: ("REWIND", 0, 0, lambda f, a, b, s: {"session": f.int(4), "position": f.int(4)}),
    0x13: ("END_SESSION", 0, 0, lambda f, a, b, s: padded(f, {"session": f.int(4)})),
    0x14: ("STEP_FAILED", 1, 1, lambda f, a, b, s: read_failed(f, a, b)),
    0x15: ("CANCEL", 0, 0, lambda f, a, b, s: padded(f, {"step": f.int(4)})),
    0x20: ("HEARTBEAT", 0, 0, lambda f, a, b, s: read_heartbeat(f)),
    0x21: ("PING", 0, 0, lambda f, a, b, s: {"number": f.int(8)}),
    0x22: ("PONG", 0, 0, lambda f, a, b, s: {"number": f.int(8), "clock_us": f.int(8)}),
    0x23: ("ERROR", 0, 1, lambda f, a, b, s: read_fault(f, b)),
    0x24: ("GOODBYE", 0, 1, lambda f, a, b, s: {"why": one_of(b, range(4))}),
    0x30: ("PUSH_OFFER", 0, 1, lambda f, a, b, s: read_push_offer(f, b)),
    0x31: ("PUSH_NEED", 0, 1, lambda f, a, b, s: {"have": [f.int(8) for _ in range(one_of(b, range(1, 65)))]}),
    0x32: ("PUSH_DATA", 0, 1, lambda f, a, b, s: read_push_data(f, b)),
    0x33: ("PUSH_STORED", 0, 1, lambda f, a, b, s: stored(f, b)),
    0x34: ("PUSH_RESULT", 1, 1, lambda f, a, b, s: {
        "outcome": one_of(a, range(3)), "item": None if b == 0xFFFF else b, "text": f.string(1000)}),
}
TO_COME = (0x07, 0x0B, 0x25)


def read_message(data, shape):
    """Name and fields, or Broken."""
    f = Fields(data)
    if data and data[0] not in KINDS:
        raise Broken("unexpected" if data[0] in TO_COME else "unknown-kind")
    kind, a, b, length = f.int(1), f.int(1), f.int(2), f.int(4)
    if length != len(data):
        raise Broken("truncated" if length > len(data) else "trailing-bytes")
    name, uses_a, uses_b, reader = KINDS[kind]
    if (a and not uses_a) or (b and not uses_b):
        raise Broken("reserved-not-zero")
    fields = reader(f, a, b, shape)
    f.end()
    return name, fields


def check_messages():
    vectors, n = load("messages.json"), 0
    seen = set()
    for v in vectors["good"]:
        name, fields = read_message(bytes.fromhex(v["hex"]), v["shape"])
        assert v["name"].startswith(name) and fields == v["fields"], (v["name"], fields)
        seen.add(name)
        n += 1
    assert seen == {kind[0] for kind in KINDS.values()}, "a message without a vector"
    for v in vectors["bad"]:
        try:
            raise AssertionError((v["name"], read_message(bytes.fromhex(v["hex"]), v["shape"])))
        except Broken as rule:
            assert str(rule) == v["rule"], (v["name"], rule)
        n += 1
    return n


# --- section 6: terms ----------------------------------------------------------------------------------------

def has_rows(terms):
    shape, role = terms["shape"], terms["role"]
    return (role < 2 or shape["input"] != []) and (role in (0, 3) or shape["output"] != [])


def compare(h, w):
    """What is agreed, or every reason to refuse in order."""
    unknown = "00" * 32
    known = lambda name: unknown in (h[name], w[name]) or h[name] == w[name]
    shape = w["shape"]
    row_format = {1: 1, 2: 2}.get(h["dtypes"])
    rows, in_flight = min(h["max_rows"], w["max_rows"]), min(h["max_in_flight"], w["max_in_flight"])
    w_in, w_out = (row_bytes(shape[side], row_format or 1) for side in ("input", "output"))
    ids = (4 * rows + 7) // 8 * 8 if shape["tokens"] else 0
    step = 16 + 16 * h["max_sessions"] + ids + rows * w_in
    done = 32 + rows * w_out
    same = lambda *names: all(h[name] == w[name] for name in names)
    host_knows = h["shape"]["input"] or h["shape"]["output"]
    fits = {
        1: same("version"), 2: w["role"] != 0, 3: same("arch"), 4: same("model") and h["model"] != unknown,
        5: known("params"), 6: same("n_blocks"),
        7: has_rows(w) and (not host_knows or h["shape"] == shape) and known("input") and known("output"),
        8: same("role"),
        9: same("first_block", "last_block") and h["first_block"] <= h["last_block"] < h["n_blocks"],
        10: known("slice"), 11: row_format is not None and w["dtypes"] & h["dtypes"] != 0,
        12: 0 < h["n_ctx"] <= w["n_ctx"], 13: 0 < h["max_sessions"] <= w["max_sessions"], 14: rows > 0,
        15: in_flight > 0, 16: max(step, done) < 2 ** 31 and h["max_sessions"] <= 65_535,
        17: h["take_back"] <= w["take_back"],
    }
    refused = [reason for reason, ok in fits.items() if not ok]
    if refused:
        return {"refused": refused}
    return {"agreed": {
        **{name: h[name] for name in ("version", "first_block", "last_block", "n_ctx", "max_sessions")},
        "row_dtype": row_format, "shape": shape, "features": h["features"] & w["features"],
        "take_back": w["take_back"], "max_rows": rows, "max_in_flight": in_flight,
        "limit_host_to_worker": max(4096, step), "limit_worker_to_host": max(4096, done)}}


def check_terms():
    n = 0
    for v in load("terms.json"):
        sides = [read_message(bytes.fromhex(v[name]), None)[1] for name in ("hello", "accept")]
        assert compare(*sides) == v["result"], (v["name"], compare(*sides))
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
    for check in (check_keys, check_noise, check_frames, check_messages, check_terms, check_transcripts):
        name = check.__name__.removeprefix("check_") + ".json"
        try:
            print(f"{name}: {check()} vectors agree")
        except AssertionError as difference:
            failed = True
            print(f"{name}: DIFFERS: {difference}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

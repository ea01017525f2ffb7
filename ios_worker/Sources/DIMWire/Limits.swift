// Limits and times of docs/PROTOCOL.md, section 12: every constant that both sides must share.

/// Milliseconds of a clock that only goes forward. The protocol never reads one: times are handed in.
public typealias Milliseconds = Int64

public enum Limit {
    /// a message in OPENING and PAIRING, either way, and the floor of every other limit: bytes
    public static let openingMessage = 4096
    /// a message host -> worker while PUSHING: bytes
    public static let pushMessage = 262_160
    /// bytes of a file in one PUSH_DATA
    public static let pushData = 262_144
    /// the worker says PUSH_STORED at least this often: bytes
    public static let pushStoredEvery: UInt64 = 16 << 20
    public static let pushItems = 64
    public static let pushItemBytes: UInt64 = 1 << 40
    /// plaintext in a frame: bytes
    public static let framePlaintext = 65_519
    /// a STEP, a STEP_DONE: bytes
    public static let stepMessage = UInt64(Int32.max)
    /// parts of a row, of one way
    public static let parts = 128
    /// strings: bytes of UTF-8
    public static let arch = 32
    public static let name = 64
    public static let text = 1000
    /// INQUIREs per connection
    public static let inquiries = 4
    /// handshakes under way at once
    public static let handshakes = 16
}

public enum Time {
    /// preamble and message 1, from TCP accept
    public static let preamble: Milliseconds = 2000
    /// HELLO, PUSH_OFFER or PAIR_STORED, from TCP accept; on the host: from dialling to ACCEPT
    public static let opening: Milliseconds = 5000
    /// on the host, from dialling to ACCEPT, where the worker's heartbeats come
    public static let openingWithHeartbeats: Milliseconds = 60_000
    /// without having sent anything, before a HEARTBEAT is sent
    public static let heartbeat: Milliseconds = 500
    /// without a byte while waiting for one
    public static let silence: Milliseconds = 3000
    /// a pairing code's life
    public static let pairing: Milliseconds = 300_000
}

/// The version of the protocol that this code speaks.
public let protocolVersion: UInt16 = 2

// What the worker's and the host's end of a connection have in common: bytes in, bytes out, when something was last
// heard and said. No rules of its own beyond the frames'.
import DIMCrypto

struct Link {
    var input = ReceiveBuffer()
    /// bytes to be sent
    var output: [UInt8] = []
    private(set) var lastSent: Milliseconds
    private var lastHeard: Milliseconds
    private var opener: FrameOpener?
    var sealer: FrameSealer?

    init(now: Milliseconds) {
        lastSent = now
        lastHeard = now
    }

    mutating func startEncryption(receiving: [UInt8], sending: [UInt8]) {
        opener = FrameOpener(key: receiving)
        sealer = FrameSealer(key: sending)
    }

    /// From now on the side waits for bytes: silence counts from here, or from the last byte if that came later.
    mutating func beginWaiting(_ now: Milliseconds) { lastHeard = max(lastHeard, now) }

    @discardableResult
    mutating func receive(now: Milliseconds, _ fill: (UnsafeMutableRawBufferPointer) -> Int) -> Int {
        let count = input.fill(fill)
        if count > 0 { lastHeard = max(lastHeard, now) }
        return count
    }

    mutating func nextMessage(limit: Int) throws(RuleBroken) -> [UInt8]? {
        try opener?.next(from: &input, limit: limit)
    }

    mutating func sendClear(_ bytes: [UInt8], now: Milliseconds) {
        output += bytes
        lastSent = now
    }

    mutating func send(_ message: Message, now: Milliseconds) { send(encoded: message.encoded(), now: now) }

    mutating func send(encoded message: [UInt8], now: Milliseconds) {
        sealer?.seal(message, into: &output)
        lastSent = now
    }

    var heartbeatDue: Milliseconds { lastSent + Time.heartbeat }
    var silenceDeadline: Milliseconds { lastHeard + Time.silence }
}

/// How a connection ended, as one side saw it.
public enum Ending: Equatable, Sendable {
    /// the peer said GOODBYE
    case goodbye(GoodbyeReason)
    /// the peer said ERROR
    case peerFailed(ErrorReport)
    /// the peer broke a rule; it was told so where the protocol answers
    case broken(RuleBroken)
    /// the peer sent REFUSE
    case refusedByPeer(Refusal)
    /// this side sent REFUSE
    case refused(RefusalReason, String)
    /// the worker serves another host
    case busy(Busy)
    /// this side said GOODBYE
    case left(GoodbyeReason)
    /// this side said ERROR about its own work
    case failed(ErrorReport)
    /// pairing is done
    case paired
    /// a push came to its end
    case pushed(PushResult)
    /// the transport ended without a word
    case lost
}

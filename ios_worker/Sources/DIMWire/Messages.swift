// The messages of docs/PROTOCOL.md section 5: one table of kinds, one case per kind. Their bytes: MessageCoding.swift.

/// The one table of numbers.
public enum Kind: UInt8, Sendable, CaseIterable {
    case hello = 0x01
    case accept = 0x02
    case refuse = 0x03
    case busy = 0x04
    case inquire = 0x05
    case offer = 0x06
    /// to come
    case probe = 0x07
    case pairRequest = 0x08
    case pairGrant = 0x09
    case pairStored = 0x0A
    /// to come
    case probed = 0x0B
    case step = 0x10
    case stepDone = 0x11
    case rewind = 0x12
    case endSession = 0x13
    case stepFailed = 0x14
    case cancel = 0x15
    case heartbeat = 0x20
    case ping = 0x21
    case pong = 0x22
    case error = 0x23
    case goodbye = 0x24
    /// to come
    case tick = 0x25
    case pushOffer = 0x30
    case pushNeed = 0x31
    case pushData = 0x32
    case pushStored = 0x33
    case pushResult = 0x34

    /// The number is taken and its bytes are told in PROTOCOL.md, but nobody may send it yet.
    var isToCome: Bool { self == .probe || self == .probed || self == .tick }

    /// The name in PROTOCOL.md and in the golden vectors.
    public var name: String {
        switch self {
        case .hello: "HELLO"
        case .accept: "ACCEPT"
        case .refuse: "REFUSE"
        case .busy: "BUSY"
        case .inquire: "INQUIRE"
        case .offer: "OFFER"
        case .probe: "PROBE"
        case .pairRequest: "PAIR_REQUEST"
        case .pairGrant: "PAIR_GRANT"
        case .pairStored: "PAIR_STORED"
        case .probed: "PROBED"
        case .step: "STEP"
        case .stepDone: "STEP_DONE"
        case .rewind: "REWIND"
        case .endSession: "END_SESSION"
        case .stepFailed: "STEP_FAILED"
        case .cancel: "CANCEL"
        case .heartbeat: "HEARTBEAT"
        case .ping: "PING"
        case .pong: "PONG"
        case .error: "ERROR"
        case .goodbye: "GOODBYE"
        case .tick: "TICK"
        case .pushOffer: "PUSH_OFFER"
        case .pushNeed: "PUSH_NEED"
        case .pushData: "PUSH_DATA"
        case .pushStored: "PUSH_STORED"
        case .pushResult: "PUSH_RESULT"
        }
    }
}

public enum Message: Equatable, Sendable {
    case hello(Terms)
    case accept(Terms)
    case refuse(Refusal)
    case busy(Busy)
    case inquire
    case offer(Terms)
    case pairRequest(name: String, software: String)
    case pairGrant(PairGrant)
    case pairStored
    case step(Step)
    case stepDone(StepDone)
    case rewind(session: UInt32, position: UInt32)
    case endSession(UInt32)
    case stepFailed(StepFailed)
    /// the step that nobody wants any more
    case cancel(UInt32)
    case heartbeat(Heartbeat)
    /// the sender's clock, microseconds
    case ping(UInt64)
    /// the PING's number, and the clock of who answers
    case pong(UInt64, clock: UInt64)
    case error(ErrorReport)
    case goodbye(GoodbyeReason)
    case pushOffer(PushOffer)
    case pushNeed([UInt64])
    case pushData(PushData)
    case pushStored(item: UInt16, bytes: UInt64)
    case pushResult(PushResult)
}

public struct Refusal: Equatable, Sendable {
    public var reason: RefusalReason
    /// of the side that refuses
    public var terms: Terms
    public var text: String

    public init(reason: RefusalReason, terms: Terms, text: String) {
        self.reason = reason
        self.terms = terms
        self.text = text
    }
}

public struct Busy: Equatable, Sendable {
    /// since when the worker serves, before this message
    public var since: UInt64  // milliseconds
    /// of the host that is served
    public var host: String

    public init(since: UInt64, host: String) {
        self.since = since
        self.host = host
    }
}

public struct PairGrant: Equatable, Sendable {
    public var key: [UInt8]  // 32
    public var name: String
    public var software: String

    public init(key: [UInt8], name: String, software: String) {
        self.key = key
        self.name = name
        self.software = software
    }
}

/// Consecutive rows of one session in a STEP.
public struct Span: Equatable, Sendable {
    public var session: UInt32
    /// of the first row
    public var position: UInt32
    /// rows
    public var count: UInt32

    public init(session: UInt32, position: UInt32, count: UInt32) {
        self.session = session
        self.position = position
        self.count = count
    }

    static let bytes = 16
}

public struct Step: Equatable, Sendable {
    public var id: UInt32
    public var spans: [Span]
    /// of the rows, where they are wanted
    public var tokens: [Int32]
    /// to come: each row by itself
    public var exact = false
    public var rows: Rows

    public init(id: UInt32, spans: [Span], tokens: [Int32] = [], rows: Rows) {
        self.id = id
        self.spans = spans
        self.tokens = tokens
        self.rows = rows
    }

    static let headerBytes = 16
}

public struct StepDone: Equatable, Sendable {
    public var id: UInt32
    public var computeMicroseconds: UInt32
    /// between the complete STEP and the beginning of its evaluation
    public var waitedMicroseconds: UInt32
    /// when it began to be computed, on the worker's clock
    public var began: UInt64
    public var rows: Rows

    public init(
        id: UInt32, computeMicroseconds: UInt32, waitedMicroseconds: UInt32, began: UInt64 = 0, rows: Rows
    ) {
        self.id = id
        self.computeMicroseconds = computeMicroseconds
        self.waitedMicroseconds = waitedMicroseconds
        self.began = began
        self.rows = rows
    }

    public static let headerBytes = 32
}

/// A STEP of which there are no rows.
public struct StepFailed: Equatable, Sendable {
    public var id: UInt32
    /// nil: it was called off, or stands on one that was or that failed
    public var report: ErrorReport?

    public init(id: UInt32, report: ErrorReport?) {
        self.id = id
        self.report = report
        self.report?.step = id
    }
}

public struct Heartbeat: Equatable, Sendable {
    public enum State: UInt8, Sendable, CaseIterable {
        case idle = 0
        case computing = 1
        case loading = 2
        case pausing = 3
    }

    public enum Temperature: UInt8, Sendable, CaseIterable {
        case unknown = 0
        case nominal = 1
        case fair = 2
        case serious = 3
        case critical = 4
    }

    public var state: State = .idle
    public var temperature: Temperature = .unknown
    /// per cent; nil = unknown
    public var battery: UInt8?
    /// what the process may still take, MiB; nil = unknown
    public var memory: UInt32?
    public var lastStep: UInt32 = 0
    /// seconds until it expects to pause; nil = unknown
    public var pauseIn: UInt16?

    public init() {}
}

public struct ErrorReport: Equatable, Sendable {
    public var code: ErrorCode
    /// 0 = none
    public var step: UInt32 = 0
    public var session: UInt32?
    public var block: UInt32?
    /// values not finite, or too large
    public var count: UInt32 = 0
    /// one sentence for the user
    public var text: String

    public init(code: ErrorCode, text: String) {
        self.code = code
        self.text = text
    }
}

/// One file of a push. Names never cross the wire: a kind and an index say which file it is.
public struct PushItem: Equatable, Sendable {
    public enum Kind: UInt8, Sendable, CaseIterable {
        case directoryManifest = 1
        case packageContents = 2
        case packageModel = 3
        case packageWeights = 4
        case selfTest = 5
        case gguf = 16
    }

    public var kind: Kind
    public var index: UInt8
    /// bytes
    public var size: UInt64
    /// SHA-256 of the file
    public var digest: Digest

    public init(kind: Kind, index: UInt8, size: UInt64, digest: Digest) {
        self.kind = kind
        self.index = index
        self.size = size
        self.digest = digest
    }

    static let bytes = 48
}

public struct PushOffer: Equatable, Sendable {
    public var model: Digest
    public var slice: Digest
    public var firstBlock: UInt32
    public var lastBlock: UInt32
    public var items: [PushItem]
    /// of the host
    public var name: String

    public init(
        model: Digest, slice: Digest, firstBlock: UInt32, lastBlock: UInt32, items: [PushItem], name: String
    ) {
        self.model = model
        self.slice = slice
        self.firstBlock = firstBlock
        self.lastBlock = lastBlock
        self.items = items
        self.name = name
    }

    /// The bytes that the push id is the SHA-256 of: all but the header and the host's name.
    public var identifyingBytes: [UInt8] {
        var writer = Writer(reserving: 72 + items.count * PushItem.bytes)
        writer.array(model.bytes)
        writer.array(slice.bytes)
        writer.u32(firstBlock)
        writer.u32(lastBlock)
        for item in items {
            writer.u8(item.kind.rawValue)
            writer.u8(item.index)
            writer.zeros(6)
            writer.u64(item.size)
            writer.array(item.digest.bytes)
        }
        return writer.bytes
    }
}

public struct PushData: Equatable, Sendable {
    /// place in the list of the PUSH_OFFER
    public var item: UInt16
    public var offset: UInt64
    public var bytes: ArraySlice<UInt8>

    public init(item: UInt16, offset: UInt64, bytes: ArraySlice<UInt8>) {
        self.item = item
        self.offset = offset
        self.bytes = bytes
    }

    static let headerBytes = 16
}

public struct PushResult: Equatable, Sendable {
    public enum Outcome: UInt8, Sendable, CaseIterable {
        case ok = 0
        case hashDiffers = 1
        case storingFailed = 2
    }

    public var outcome: Outcome
    /// nil = all
    public var item: UInt16?
    public var text: String

    public init(outcome: Outcome, item: UInt16?, text: String) {
        self.outcome = outcome
        self.item = item
        self.text = text
    }
}

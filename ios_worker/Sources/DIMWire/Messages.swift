// The messages of docs/PROTOCOL.md section 5: one table of kinds, one case per kind, each read and written here and
// nowhere else. Every message starts with the same 8 bytes:
//
//   | kind: u8 | a: u8 | b: u16 | length of the whole message: u32 |
//
// Reading is strict: a message is read to exactly its length. What is allowed when is not decided here, but in
// WorkerConnection and HostConnection.

/// The one table of numbers.
public enum Kind: UInt8, Sendable, CaseIterable {
    case hello = 0x01
    case accept = 0x02
    case refuse = 0x03
    case busy = 0x04
    case inquire = 0x05
    case offer = 0x06
    case pairRequest = 0x08
    case pairGrant = 0x09
    case pairStored = 0x0A
    case step = 0x10
    case stepDone = 0x11
    case rewind = 0x12
    case endSession = 0x13
    case heartbeat = 0x20
    case ping = 0x21
    case pong = 0x22
    case error = 0x23
    case goodbye = 0x24
    case pushOffer = 0x30
    case pushNeed = 0x31
    case pushData = 0x32
    case pushStored = 0x33
    case pushResult = 0x34

    /// The name in PROTOCOL.md and in the golden vectors.
    public var name: String {
        switch self {
        case .hello: "HELLO"
        case .accept: "ACCEPT"
        case .refuse: "REFUSE"
        case .busy: "BUSY"
        case .inquire: "INQUIRE"
        case .offer: "OFFER"
        case .pairRequest: "PAIR_REQUEST"
        case .pairGrant: "PAIR_GRANT"
        case .pairStored: "PAIR_STORED"
        case .step: "STEP"
        case .stepDone: "STEP_DONE"
        case .rewind: "REWIND"
        case .endSession: "END_SESSION"
        case .heartbeat: "HEARTBEAT"
        case .ping: "PING"
        case .pong: "PONG"
        case .error: "ERROR"
        case .goodbye: "GOODBYE"
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
    case heartbeat(Heartbeat)
    case ping(UInt64)
    case pong(UInt64)
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
    public var rows: Rows

    public init(id: UInt32, spans: [Span], rows: Rows) {
        self.id = id
        self.spans = spans
        self.rows = rows
    }

    static let headerBytes = 16
}

public struct StepDone: Equatable, Sendable {
    public var id: UInt32
    public var computeMicroseconds: UInt32
    /// between the complete STEP and the beginning of its evaluation
    public var waitedMicroseconds: UInt32
    public var rows: Rows

    public init(id: UInt32, computeMicroseconds: UInt32, waitedMicroseconds: UInt32, rows: Rows) {
        self.id = id
        self.computeMicroseconds = computeMicroseconds
        self.waitedMicroseconds = waitedMicroseconds
        self.rows = rows
    }

    public static let headerBytes = 24
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

/// The 8 bytes at the start of every message.
struct Header {
    static let bytes = 8

    let kind: UInt8
    let a: UInt8
    let b: UInt16
    let length: UInt32

    init(_ message: [UInt8]) throws(RuleBroken) {
        var reader = Reader(message)
        kind = try reader.u8()
        a = try reader.u8()
        b = try reader.u16()
        length = try reader.u32()
    }
}

extension Message {
    /// What stands in for "none" in fields of 32 bits.
    private static let none32 = UInt32.max
    private static let none16 = UInt16.max
    private static let none8 = UInt8.max

    /// The kind of `message`, from its header; unknown numbers are a broken rule.
    static func kind(of message: [UInt8]) throws(RuleBroken) -> Kind {
        let header = try Header(message)
        guard let kind = Kind(rawValue: header.kind) else { throw RuleBroken(.unknownKind, "kind \(header.kind)") }
        return kind
    }

    /// Reads one whole message. Only its layout is checked, not whether it fits what was agreed.
    /// - Parameter nEmbd: values of a row, from which the length of STEP and STEP_DONE follows
    public init(decoding message: [UInt8], nEmbd: Int) throws(RuleBroken) {
        let header = try Header(message)
        guard let kind = Kind(rawValue: header.kind) else { throw RuleBroken(.unknownKind, "kind \(header.kind)") }
        guard header.length <= message.count else {
            throw RuleBroken(.truncated, "\(message.count) bytes of \(header.length)")
        }
        guard header.length == message.count else {
            throw RuleBroken(.trailingBytes, "\(message.count) bytes, \(header.length) announced")
        }
        var reader = Reader(message, from: Header.bytes)
        try Message.checkFreeFields(header, kind)

        switch kind {
        case .hello: self = .hello(try Terms(from: &reader))
        case .accept: self = .accept(try Terms(from: &reader))
        case .offer: self = .offer(try Terms(from: &reader))
        case .refuse:
            guard let reason = RefusalReason(rawValue: header.b) else {
                throw RuleBroken(.badValue, "reason \(header.b)")
            }
            let terms = try Terms(from: &reader)
            self = .refuse(Refusal(reason: reason, terms: terms, text: try reader.string(atMost: Limit.text)))
        case .busy:
            self = .busy(Busy(since: try reader.u64(), host: try reader.string(atMost: Limit.name)))
        case .inquire: self = .inquire
        case .pairRequest:
            self = .pairRequest(
                name: try reader.string(atMost: Limit.name), software: try reader.string(atMost: Limit.name))
        case .pairGrant:
            self = .pairGrant(
                PairGrant(
                    key: try reader.array(32), name: try reader.string(atMost: Limit.name),
                    software: try reader.string(atMost: Limit.name)))
        case .pairStored: self = .pairStored
        case .step, .stepDone:
            // rows run to the end of the message: their reader has checked it
            self =
                kind == .step
                ? .step(try Step(from: &reader, message: message, header: header, nEmbd: nEmbd))
                : .stepDone(try StepDone(from: &reader, message: message, header: header, nEmbd: nEmbd))
            return
        case .rewind: self = .rewind(session: try reader.u32(), position: try reader.u32())
        case .endSession:
            self = .endSession(try reader.u32())
            try reader.zeros(4)
        case .heartbeat: self = .heartbeat(try Heartbeat(from: &reader))
        case .ping: self = .ping(try reader.u64())
        case .pong: self = .pong(try reader.u64())
        case .error:
            var report = ErrorReport(code: ErrorCode(wire: header.b), text: "")
            report.step = try reader.u32()
            report.session = Message.known(try reader.u32())
            report.block = Message.known(try reader.u32())
            report.count = try reader.u32()
            report.text = try reader.string(atMost: Limit.text)
            self = .error(report)
        case .goodbye:
            guard let reason = GoodbyeReason(rawValue: header.b) else {
                throw RuleBroken(.badValue, "GOODBYE \(header.b)")
            }
            self = .goodbye(reason)
        case .pushOffer: self = .pushOffer(try PushOffer(from: &reader, count: Int(header.b)))
        case .pushNeed:
            guard (1...Limit.pushItems).contains(Int(header.b)) else {
                throw RuleBroken(.badValue, "\(header.b) items")
            }
            var have: [UInt64] = []
            for _ in 0..<header.b { have.append(try reader.u64()) }
            self = .pushNeed(have)
        case .pushData:
            let offset = try reader.u64()
            guard reader.remaining >= 1 else { throw RuleBroken(.badValue, "PUSH_DATA without data") }
            guard reader.remaining <= Limit.pushData else {
                throw RuleBroken(.tooLong, "PUSH_DATA of \(reader.remaining) bytes")
            }
            self = .pushData(PushData(item: header.b, offset: offset, bytes: message[reader.offset...]))
            return
        case .pushStored:
            self = .pushStored(item: header.b, bytes: try reader.u64())
            try reader.zeros(8)
        case .pushResult:
            guard let outcome = PushResult.Outcome(rawValue: header.a) else {
                throw RuleBroken(.badValue, "PUSH_RESULT \(header.a)")
            }
            self = .pushResult(
                PushResult(
                    outcome: outcome, item: header.b == Message.none16 ? nil : header.b,
                    text: try reader.string(atMost: Limit.text)))
        }
        try reader.end()
    }

    /// The message as bytes. Strings that are too long are cut.
    public func encoded() -> [UInt8] {
        var writer = Writer(reserving: 256)
        switch self {
        case .hello(let terms): header(&writer, .hello) { terms.write(to: &$0) }
        case .accept(let terms): header(&writer, .accept) { terms.write(to: &$0) }
        case .offer(let terms): header(&writer, .offer) { terms.write(to: &$0) }
        case .refuse(let refusal):
            header(&writer, .refuse, b: refusal.reason.rawValue) {
                refusal.terms.write(to: &$0)
                $0.string(refusal.text, atMost: Limit.text)
            }
        case .busy(let busy):
            header(&writer, .busy) {
                $0.u64(busy.since)
                $0.string(busy.host, atMost: Limit.name)
            }
        case .inquire: header(&writer, .inquire) { _ in }
        case .pairRequest(let name, let software):
            header(&writer, .pairRequest) {
                $0.string(name, atMost: Limit.name)
                $0.string(software, atMost: Limit.name)
            }
        case .pairGrant(let grant):
            header(&writer, .pairGrant) {
                $0.array(grant.key)
                $0.string(grant.name, atMost: Limit.name)
                $0.string(grant.software, atMost: Limit.name)
            }
        case .pairStored: header(&writer, .pairStored) { _ in }
        case .step(let step):
            header(&writer, .step, a: step.rows.format.rawValue, b: UInt16(clamping: step.spans.count)) {
                $0.u32(step.id)
                $0.u32(UInt32(step.rows.count))
                for span in step.spans {
                    $0.u32(span.session)
                    $0.u32(span.position)
                    $0.u32(span.count)
                    $0.u32(0)
                }
                step.rows.write(to: &$0)
            }
        case .stepDone(let done):
            header(&writer, .stepDone, a: done.rows.format.rawValue) {
                $0.u32(done.id)
                $0.u32(UInt32(done.rows.count))
                $0.u32(done.computeMicroseconds)
                $0.u32(done.waitedMicroseconds)
                done.rows.write(to: &$0)
            }
        case .rewind(let session, let position):
            header(&writer, .rewind) {
                $0.u32(session)
                $0.u32(position)
            }
        case .endSession(let session):
            header(&writer, .endSession) {
                $0.u32(session)
                $0.u32(0)
            }
        case .heartbeat(let beat):
            header(&writer, .heartbeat) {
                $0.u8(beat.state.rawValue)
                $0.u8(beat.temperature.rawValue)
                $0.u8(beat.battery ?? Message.none8)
                $0.u8(0)
                $0.u32(beat.memory ?? Message.none32)
                $0.u32(beat.lastStep)
                $0.u32(0)
            }
        case .ping(let number): header(&writer, .ping) { $0.u64(number) }
        case .pong(let number): header(&writer, .pong) { $0.u64(number) }
        case .error(let report):
            header(&writer, .error, b: report.code.rawValue) {
                $0.u32(report.step)
                $0.u32(report.session ?? Message.none32)
                $0.u32(report.block ?? Message.none32)
                $0.u32(report.count)
                $0.string(report.text, atMost: Limit.text)
            }
        case .goodbye(let reason): header(&writer, .goodbye, b: reason.rawValue) { _ in }
        case .pushOffer(let offer):
            header(&writer, .pushOffer, b: UInt16(clamping: offer.items.count)) {
                $0.array(offer.identifyingBytes)
                $0.string(offer.name, atMost: Limit.name)
            }
        case .pushNeed(let have):
            header(&writer, .pushNeed, b: UInt16(have.count)) { for bytes in have { $0.u64(bytes) } }
        case .pushData(let data):
            header(&writer, .pushData, b: data.item) {
                $0.u64(data.offset)
                $0.array(data.bytes)
            }
        case .pushStored(let item, let bytes):
            header(&writer, .pushStored, b: item) {
                $0.u64(bytes)
                $0.u64(0)
            }
        case .pushResult(let result):
            header(&writer, .pushResult, a: result.outcome.rawValue, b: result.item ?? Message.none16) {
                $0.string(result.text, atMost: Limit.text)
            }
        }
        writer.setLength()
        return writer.bytes
    }

    public var kind: Kind {
        switch self {
        case .hello: .hello
        case .accept: .accept
        case .refuse: .refuse
        case .busy: .busy
        case .inquire: .inquire
        case .offer: .offer
        case .pairRequest: .pairRequest
        case .pairGrant: .pairGrant
        case .pairStored: .pairStored
        case .step: .step
        case .stepDone: .stepDone
        case .rewind: .rewind
        case .endSession: .endSession
        case .heartbeat: .heartbeat
        case .ping: .ping
        case .pong: .pong
        case .error: .error
        case .goodbye: .goodbye
        case .pushOffer: .pushOffer
        case .pushNeed: .pushNeed
        case .pushData: .pushData
        case .pushStored: .pushStored
        case .pushResult: .pushResult
        }
    }

    /// `a` and `b` must be zero where a kind gives them no meaning.
    private static func checkFreeFields(_ header: Header, _ kind: Kind) throws(RuleBroken) {
        let usesA = kind == .step || kind == .stepDone || kind == .pushResult
        let usesB: Bool =
            switch kind {
            case .refuse, .step, .error, .goodbye, .pushOffer, .pushNeed, .pushData, .pushStored, .pushResult: true
            default: false
            }
        if !usesA, header.a != 0 { throw RuleBroken(.reservedNotZero, "a of \(kind.name) is \(header.a)") }
        if !usesB, header.b != 0 { throw RuleBroken(.reservedNotZero, "b of \(kind.name) is \(header.b)") }
    }

    private static func known(_ value: UInt32) -> UInt32? { value == none32 ? nil : value }

    private func header(
        _ writer: inout Writer, _ kind: Kind, a: UInt8 = 0, b: UInt16 = 0, _ body: (inout Writer) -> Void
    ) {
        writer.u8(kind.rawValue)
        writer.u8(a)
        writer.u16(b)
        writer.u32(0)
        body(&writer)
    }
}

extension Step {
    fileprivate init(from reader: inout Reader, message: [UInt8], header: Header, nEmbd: Int) throws(RuleBroken) {
        let format = try knownFormat(header.a)
        id = try reader.u32()
        let count = try reader.u32()
        let expected =
            UInt64(Step.headerBytes) + UInt64(header.b) * UInt64(Span.bytes)
            + Rows.bytes(format, count: count, nEmbd: nEmbd)
        try checkLength(message, expected)
        spans = []
        spans.reserveCapacity(Int(header.b))
        for _ in 0..<header.b {
            spans.append(Span(session: try reader.u32(), position: try reader.u32(), count: try reader.u32()))
            try reader.zeros(4)
        }
        rows = try Rows(from: &reader, message: message, format: format, count: Int(count))
    }
}

extension StepDone {
    fileprivate init(
        from reader: inout Reader, message: [UInt8], header: Header, nEmbd: Int
    ) throws(RuleBroken) {
        let format = try knownFormat(header.a)
        id = try reader.u32()
        let count = try reader.u32()
        computeMicroseconds = try reader.u32()
        waitedMicroseconds = try reader.u32()
        try checkLength(message, UInt64(StepDone.headerBytes) + Rows.bytes(format, count: count, nEmbd: nEmbd))
        rows = try Rows(from: &reader, message: message, format: format, count: Int(count))
    }
}

/// The length that follows from the counts, before anything is allocated for them.
private func checkLength(_ message: [UInt8], _ expected: UInt64) throws(RuleBroken) {
    let found = UInt64(message.count)
    guard found >= expected else { throw RuleBroken(.truncated, "\(found) bytes, the counts make \(expected)") }
    guard found == expected else { throw RuleBroken(.trailingBytes, "\(found) bytes, the counts make \(expected)") }
}

private func knownFormat(_ value: UInt8) throws(RuleBroken) -> RowFormat {
    guard let format = RowFormat(rawValue: value) else { throw RuleBroken(.badValue, "row format \(value)") }
    return format
}

extension Heartbeat {
    fileprivate init(from reader: inout Reader) throws(RuleBroken) {
        let state = try reader.u8()
        let temperature = try reader.u8()
        guard let knownState = State(rawValue: state) else { throw RuleBroken(.badValue, "state \(state)") }
        guard let knownTemperature = Temperature(rawValue: temperature) else {
            throw RuleBroken(.badValue, "temperature \(temperature)")
        }
        self.state = knownState
        self.temperature = knownTemperature
        let battery = try reader.u8()
        guard battery <= 100 || battery == .max else { throw RuleBroken(.badValue, "battery at \(battery) %") }
        self.battery = battery == .max ? nil : battery
        try reader.zeros(1)
        let memory = try reader.u32()
        self.memory = memory == .max ? nil : memory
        lastStep = try reader.u32()
        try reader.zeros(4)
    }
}

extension PushOffer {
    fileprivate init(from reader: inout Reader, count: Int) throws(RuleBroken) {
        guard (1...Limit.pushItems).contains(count) else { throw RuleBroken(.badValue, "\(count) items") }
        model = Digest(try reader.array(32))!
        slice = Digest(try reader.array(32))!
        firstBlock = try reader.u32()
        lastBlock = try reader.u32()
        items = []
        for _ in 0..<count {
            let kind = try reader.u8()
            let index = try reader.u8()
            try reader.zeros(6)
            let size = try reader.u64()
            let digest = Digest(try reader.array(32))!
            guard let known = PushItem.Kind(rawValue: kind) else {
                throw RuleBroken(.badValue, "item of kind \(kind)")
            }
            guard size >= 1, size <= Limit.pushItemBytes else {
                throw RuleBroken(.pushItems, "item of \(size) bytes")
            }
            if let last = items.last, (last.kind.rawValue, last.index) >= (kind, index) {
                throw RuleBroken(.pushItems, "items are not in order")
            }
            items.append(PushItem(kind: known, index: index, size: size, digest: digest))
        }
        name = try reader.string(atMost: Limit.name)
    }
}

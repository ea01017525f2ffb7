// The messages of docs/PROTOCOL.md section 5 as bytes: each is read and written here and nowhere else. Every message starts
// with the same 8 bytes:
//
//   | kind: u8 | a: u8 | b: u16 | length of the whole message: u32 |
//
// Reading is strict: a message is read to exactly its length. What is allowed when is not decided here, but in
// WorkerConnection and HostConnection.

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
    fileprivate static let none32 = UInt32.max
    private static let none16 = UInt16.max
    private static let none8 = UInt8.max

    /// The kind of `message`, from its header; unknown numbers are a broken rule.
    static func kind(of message: [UInt8]) throws(RuleBroken) -> Kind {
        let header = try Header(message)
        guard let kind = Kind(rawValue: header.kind) else { throw RuleBroken(.unknownKind, "kind \(header.kind)") }
        return kind
    }

    /// Reads one whole message. Only its layout is checked, not whether it fits what was agreed. As long as the table of
    /// kinds: a case for each.
    /// - Parameter shape: what rows are made of, from which the length of STEP and STEP_DONE follows
    public init(decoding message: [UInt8], shape: Shape) throws(RuleBroken) {
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
                ? .step(try Step(from: &reader, message: message, header: header, shape))
                : .stepDone(try StepDone(from: &reader, message: message, header: header, shape))
            return
        case .rewind: self = .rewind(session: try reader.u32(), position: try reader.u32())
        case .endSession:
            self = .endSession(try reader.u32())
            try reader.zeros(4)
        case .stepFailed: self = .stepFailed(try StepFailed(from: &reader, header: header))
        case .cancel:
            self = .cancel(try reader.u32())
            try reader.zeros(4)
        case .probe, .probed, .tick: throw RuleBroken(.unexpected, "\(kind.name) is to come")
        case .heartbeat: self = .heartbeat(try Heartbeat(from: &reader))
        case .ping: self = .ping(try reader.u64())
        case .pong: self = .pong(try reader.u64(), clock: try reader.u64())
        case .error: self = .error(try ErrorReport(from: &reader, code: header.b))
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

    /// The message as bytes. Strings that are too long are cut. As long as the table of kinds: a case for each.
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
            let format = step.rows.format.rawValue | (step.exact ? Step.exactBit : 0)
            header(&writer, .step, a: format, b: UInt16(clamping: step.spans.count)) {
                $0.u32(step.id)
                $0.u32(UInt32(step.rows.count))
                for span in step.spans {
                    $0.u32(span.session)
                    $0.u32(span.position)
                    $0.u32(span.count)
                    $0.u32(0)
                }
                for id in step.tokens { $0.u32(UInt32(bitPattern: id)) }
                if step.tokens.count % 2 == 1 { $0.u32(0) }
                step.rows.write(to: &$0)
            }
        case .stepDone(let done):
            header(&writer, .stepDone, a: done.rows.format.rawValue) {
                $0.u32(done.id)
                $0.u32(UInt32(done.rows.count))
                $0.u32(done.computeMicroseconds)
                $0.u32(done.waitedMicroseconds)
                $0.u64(done.began)
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
                $0.u16(beat.pauseIn ?? Message.none16)
                $0.u16(0)
            }
        case .ping(let number): header(&writer, .ping) { $0.u64(number) }
        case .pong(let number, let clock):
            header(&writer, .pong) {
                $0.u64(number)
                $0.u64(clock)
            }
        case .error(let report):
            header(&writer, .error, b: report.code.rawValue) { report.write(to: &$0) }
        case .stepFailed(let failed):
            var said = failed.report ?? ErrorReport(code: .internal, text: "")
            said.step = failed.id
            let void = failed.report == nil
            header(&writer, .stepFailed, a: void ? 1 : 0, b: void ? 0 : said.code.rawValue) { said.write(to: &$0) }
        case .cancel(let step):
            header(&writer, .cancel) {
                $0.u32(step)
                $0.u32(0)
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
        case .stepFailed: .stepFailed
        case .cancel: .cancel
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
        let usesA = kind == .step || kind == .stepDone || kind == .stepFailed || kind == .pushResult
        let usesB: Bool =
            switch kind {
            case .refuse, .step, .stepFailed, .error, .goodbye, .pushOffer, .pushNeed, .pushData, .pushStored,
                .pushResult:
                true
            default: false
            }
        if !usesA, header.a != 0 { throw RuleBroken(.reservedNotZero, "a of \(kind.name) is \(header.a)") }
        if !usesB, header.b != 0 { throw RuleBroken(.reservedNotZero, "b of \(kind.name) is \(header.b)") }
    }

    fileprivate static func known(_ value: UInt32) -> UInt32? { value == none32 ? nil : value }

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

extension ErrorReport {
    fileprivate init(from reader: inout Reader, code: UInt16) throws(RuleBroken) {
        self.init(code: ErrorCode(wire: code), text: "")
        step = try reader.u32()
        session = Message.known(try reader.u32())
        block = Message.known(try reader.u32())
        count = try reader.u32()
        text = try reader.string(atMost: Limit.text)
    }

    fileprivate func write(to writer: inout Writer) {
        writer.u32(step)
        writer.u32(session ?? Message.none32)
        writer.u32(block ?? Message.none32)
        writer.u32(count)
        writer.string(text, atMost: Limit.text)
    }
}

extension StepFailed {
    fileprivate init(from reader: inout Reader, header: Header) throws(RuleBroken) {
        let report = try ErrorReport(from: &reader, code: header.b)
        switch header.a {
        case 0: self.init(id: report.step, report: report)
        case 1:
            var void = ErrorReport(code: .internal, text: "")
            void.step = report.step
            // nothing more is said of one that was called off
            guard header.b == 0, report == void else { throw RuleBroken(.reservedNotZero, "a void step with a reason") }
            self.init(id: report.step, report: nil)
        default: throw RuleBroken(.badValue, "STEP_FAILED \(header.a)")
        }
    }
}

extension Step {
    /// of the row format: each row by itself
    static let exactBit: UInt8 = 0x10

    fileprivate init(from reader: inout Reader, message: [UInt8], header: Header, _ shape: Shape) throws(RuleBroken) {
        let format = try knownFormat(header.a & ~Step.exactBit)
        exact = header.a & Step.exactBit != 0
        id = try reader.u32()
        let count = try reader.u32()
        let head = UInt64(Step.headerBytes) + UInt64(header.b) * UInt64(Span.bytes) + shape.tokenBytes(count)
        let (expected, overflow) = head.addingReportingOverflow(Rows.bytes(format, count: count, shape.input))
        try checkLength(message, overflow ? .max : expected)
        spans = []
        spans.reserveCapacity(Int(header.b))
        for _ in 0..<header.b {
            spans.append(Span(session: try reader.u32(), position: try reader.u32(), count: try reader.u32()))
            try reader.zeros(4)
        }
        tokens = []
        if shape.readsTokens {
            for _ in 0..<count { tokens.append(Int32(bitPattern: try reader.u32())) }
            if count % 2 == 1 { try reader.zeros(4) }
        }
        rows = try Rows(from: &reader, message: message, format: format, count: Int(count))
    }
}

extension StepDone {
    fileprivate init(
        from reader: inout Reader, message: [UInt8], header: Header, _ shape: Shape
    ) throws(RuleBroken) {
        let format = try knownFormat(header.a)
        id = try reader.u32()
        let count = try reader.u32()
        computeMicroseconds = try reader.u32()
        waitedMicroseconds = try reader.u32()
        began = try reader.u64()
        let rowBytes = Rows.bytes(format, count: count, shape.output)
        let (expected, overflow) = UInt64(StepDone.headerBytes).addingReportingOverflow(rowBytes)
        try checkLength(message, overflow ? .max : expected)
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
        let pauseIn = try reader.u16()
        self.pauseIn = pauseIn == .max ? nil : pauseIn
        try reader.zeros(2)
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

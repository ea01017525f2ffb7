// The worker's end of one connection as a state machine (docs/PROTOCOL.md section 10): bytes and times in, bytes and
// events out. No socket, no clock, no thread, no randomness but what is handed in; the same calls give the same bytes.
//
// Kinds of method, in the order of their use:
//   in      receive (bytes from the socket), disconnected (the socket ended), beginWaiting (after a computation)
//   events  poll, again and again until it gives nil
//   answers accept / busy / refuse / grant / need ..., stepDone, heartbeat, goodbye, fail
//   out     output, sent
//   times   nextWake, heartbeatDue
import DIMCrypto

/// What a worker knows before anybody has connected.
public struct WorkerSecrets: Sendable {
    public var keys: [PairKey]
    /// of the pairing window, while it is open
    public var pairing: PairKey?

    public init(keys: [PairKey] = [], pairing: PairKey? = nil) {
        self.keys = keys
        self.pairing = pairing
    }
}

public enum WorkerEvent: Equatable, Sendable {
    /// the peer has the key (nil while pairing); the name is for logs
    case handshaken(KeyID?, connection: String)
    /// the host's terms fit: call `accept`, `busy` or `refuse`
    case hello(Terms, Agreed)
    /// call `need`, `busy` or `refuse`
    case pushOffered(PushOffer)
    /// call `grant` or `fail`
    case pairRequested(name: String, software: String)
    /// unless it `isVoid` when its turn comes evaluate and call `stepDone` or `stepFailed`
    case step(Step)
    /// when the steps before it are answered call `rewound`
    case rewind(session: UInt32, position: UInt32)
    /// the same, to 0
    case endSession(UInt32)
    case pushData(PushData)
    case heartbeat(Heartbeat)
    /// nothing follows but the bytes still in `output`
    case closed(Ending)
}

public struct WorkerConnection {
    private enum State {
        case preamble
        case message1(preamble: [UInt8], Preamble, chosen: UInt16)
        case opening
        /// HELLO or PUSH_OFFER was passed on, its answer is awaited
        case deciding(Decision)
        case serving
        case pushing
        /// true once the grant is sent
        case pairing(granted: Bool)
        case closed
    }

    private enum Decision {
        case hello(Terms, Agreed)
        case push(PushOffer)
        case grant
    }

    private var state = State.preamble
    var link: Link
    private let acceptedAt: Milliseconds
    private let secrets: WorkerSecrets
    private let crowded: Bool
    private let ephemeral: [UInt8]
    private let greeting: Greeting
    var terms: Terms
    private(set) var chosen: UInt16 = 0
    private var inquiries = 0
    private var firstServingMessage = true
    private var agreed: Agreed?
    private var books: SessionBooks?
    private var pushBooks: PushBooks?
    private var ping: UInt64?
    /// steps that nobody wants any more and that have no answer yet
    private var calledOff: Set<UInt32> = []
    /// the last STEP that was read
    private var lastRead: UInt32 = 0
    /// sessions that stand on a step that failed or was called off, and from which position on
    private var broken: [UInt32: UInt32] = [:]
    /// events that follow from one message, in order
    private var pending: [WorkerEvent] = []

    /// - Parameters:
    ///   - terms: what the worker holds and can; the version is set by the handshake
    ///   - acceptedAt: when TCP accepted
    ///   - nonce: 16 random bytes
    ///   - ephemeral: 32 random bytes
    ///   - crowded: too many handshakes are under way: this one only gets its status
    public init(
        terms: Terms, secrets: WorkerSecrets, acceptedAt: Milliseconds,
        nonce: [UInt8] = randomBytes(KeyMark.nonceBytes), ephemeral: [UInt8] = randomBytes(keyBytes),
        crowded: Bool = false
    ) {
        self.terms = terms
        self.secrets = secrets
        self.acceptedAt = acceptedAt
        self.ephemeral = ephemeral
        self.crowded = crowded
        greeting = Greeting(nonce: nonce)
        link = Link(now: acceptedAt)
        // the worker speaks first
        link.sendClear(greeting.encoded(), now: acceptedAt)
    }

    // MARK: in

    /// Lets `fill` write bytes of the socket; it returns how many.
    @discardableResult
    public mutating func receive(now: Milliseconds, _ fill: (UnsafeMutableRawBufferPointer) -> Int) -> Int {
        link.receive(now: now, fill)
    }

    /// The socket ended.
    public mutating func disconnected() {
        if case .closed = state { return }
        end(.lost)
    }

    /// The worker comes back from a computation: silence counts from here.
    public mutating func beginWaiting(now: Milliseconds) { link.beginWaiting(now) }

    // MARK: events

    /// The next thing that happened; nil when more bytes or time are needed.
    public mutating func poll(now: Milliseconds) -> WorkerEvent? {
        while pending.isEmpty {
            if case .closed = state { return nil }
            do throws(RuleBroken) {
                guard try advance(now) else {
                    try checkDeadline(now)
                    return nil
                }
            } catch {
                broken(error, now)
            }
        }
        return pending.removeFirst()
    }

    /// One step forward; false if there is nothing to do with the bytes that are there.
    private mutating func advance(_ now: Milliseconds) throws(RuleBroken) -> Bool {
        switch state {
        case .closed, .deciding: return false
        case .preamble: return try readPreamble(now)
        case .message1(let bytes, let preamble, let chosen):
            return try readMessage1(bytes, preamble, chosen, now)
        case .opening, .serving, .pushing, .pairing:
            guard let message = try link.nextMessage(limit: limit) else { return false }
            try take(message, now)
            return true
        }
    }

    private mutating func readPreamble(_ now: Milliseconds) throws(RuleBroken) -> Bool {
        for index in 0..<min(link.input.count, Preamble.magic.count)
        where link.input[index] != Preamble.magic[index] {
            throw RuleBroken(.badMagic, "byte \(index) is \(link.input[index])")
        }
        guard link.input.count >= Preamble.bytes else { return false }
        let bytes = link.input.take(Preamble.bytes)
        // versions first: the rest is only known among versions that this side speaks
        let versions = try Preamble.versions(bytes)
        guard versions.contains(protocolVersion) else {
            answer(.version, now)
            throw RuleBroken(
                .version,
                "the host speaks \(versions.lowerBound)-\(versions.upperBound), this worker \(protocolVersion)")
        }
        let preamble = try Preamble(bytes)
        guard !crowded else {
            answer(.crowded, now)
            throw RuleBroken(.crowded, "too many handshakes are under way")
        }
        state = .message1(preamble: bytes, preamble, chosen: protocolVersion)
        return true
    }

    /// The key that the host names.
    private mutating func key(of preamble: Preamble, _ now: Milliseconds) throws(RuleBroken) -> PairKey {
        switch preamble.purpose {
        case .paired:
            guard let key = secrets.keys.first(where: { preamble.mark.names($0, nonce: greeting.nonce) }) else {
                answer(.key, now)
                throw RuleBroken(.key, "its key is not known")
            }
            return key
        case .pairing:
            guard let key = secrets.pairing else {
                answer(.noPairing, now)
                throw RuleBroken(.noPairing, "no pairing code is open")
            }
            return key
        }
    }

    private mutating func readMessage1(
        _ preambleBytes: [UInt8], _ preamble: Preamble, _ chosen: UInt16, _ now: Milliseconds
    ) throws(RuleBroken) -> Bool {
        guard link.input.count >= 2 else { return false }
        let length = Int(link.input[0]) | Int(link.input[1]) << 8
        guard length == message1Bytes else { throw RuleBroken(.noiseLength, "message 1 of \(length) bytes") }
        guard link.input.count >= 2 + length else { return false }
        let message1 = Array(link.input.take(2 + length).dropFirst(2))
        let key = try key(of: preamble, now)

        do throws(NoiseError) {
            let prologue = noisePrologue(greeting: greeting.encoded(), preamble: preambleBytes)
            var noise = try NoiseResponder(prologue: prologue, psk: key.bytes, message1: message1)
            let clear = Answer(status: .go, chosen: chosen).encoded()
            let (message2, transport) = try noise.writeMessage2(ephemeral: ephemeral, payload: clear)
            var flight = Writer(reserving: Answer.bytes + 2 + message2Bytes)
            flight.array(clear)
            flight.u16(UInt16(message2.count))
            flight.array(message2)
            link.sendClear(flight.bytes, now: now)
            link.startEncryption(receiving: transport.hostKey, sending: transport.workerKey)
            self.chosen = chosen
            terms.version = chosen
            let paired = preamble.purpose == .paired
            state = paired ? .opening : .pairing(granted: false)
            pending.append(.handshaken(paired ? key.id : nil, connection: transport.name))
        } catch .zeroResult {
            throw RuleBroken(.zeroDH, "the host's ephemeral key is a point of small order")
        } catch {
            answer(.key, now)
            throw RuleBroken(.key, preamble.purpose == .pairing ? "wrong pairing code" : "wrong key")
        }
        return true
    }

    /// The limit of the moment for what the host sends: bytes.
    private var limit: Int {
        switch state {
        case .serving: agreed?.hostMessageLimit ?? Limit.openingMessage
        case .pushing: Limit.pushMessage
        default: Limit.openingMessage
        }
    }

    /// One whole message: allowed in this state? well-formed? within the books?
    private mutating func take(_ message: [UInt8], _ now: Milliseconds) throws(RuleBroken) {
        let kind = try Message.kind(of: message)
        guard isAllowed(kind) else { throw RuleBroken(.unexpected, "\(kind.name) is not allowed here") }
        let decoded = try Message(decoding: message, shape: agreed?.shape ?? Shape())
        if case .serving = state { firstServingMessage = false }

        switch decoded {
        case .inquire:
            inquiries += 1
            guard inquiries <= Limit.inquiries else { throw RuleBroken(.unexpected, "INQUIRE number \(inquiries)") }
            link.send(.offer(terms), now: now)
        case .hello(let host):
            do throws(Mismatch) {
                let agreed = try Agreed(host: host, worker: terms, chosen: chosen)
                state = .deciding(.hello(host, agreed))
                pending.append(.hello(host, agreed))
            } catch {
                refuse(error.reason, error.text, now: now)
            }
        case .pushOffer(let offer):
            guard terms.features.contains(.push) else {
                refuse(.noPush, "this worker takes no files", now: now)
                return
            }
            state = .deciding(.push(offer))
            pending.append(.pushOffered(offer))
        case .pairRequest(let name, let software):
            state = .deciding(.grant)
            pending.append(.pairRequested(name: name, software: software))
        case .pairStored: end(.paired)
        case .step(let step):
            try books?.step(
                id: step.id, rows: step.rows.count, format: step.rows.format, exact: step.exact, spans: step.spans)
            lastRead = step.id
            let bad = step.rows.nonFiniteCount(agreed?.shape.input ?? Layout())
            guard bad == 0 else { throw RuleBroken(.nonFinite, "\(bad) values of step \(step.id) are not finite") }
            pending.append(.step(step))
        case .rewind(let session, let position):
            try books?.rewind(session: session, position: position)
            pending.append(.rewind(session: session, position: position))
        case .endSession(let session):
            try books?.end(session: session)
            pending.append(.endSession(session))
        case .cancel(let step):
            // answered, or never sent: nothing to call off
            if let oldest = books?.oldest, (oldest...lastRead).contains(step) { calledOff.insert(step) }
        case .pushData(let data):
            try pushBooks?.data(data)
            pending.append(.pushData(data))
        case .heartbeat(let beat): pending.append(.heartbeat(beat))
        case .ping(let number): link.send(.pong(number, clock: clock(now)), now: now)
        case .pong(let number, _): if ping == number { ping = nil }
        case .refuse(let refusal): end(.refusedByPeer(refusal))
        case .error(let report): end(.peerFailed(report))
        case .goodbye(let reason): end(.goodbye(reason))
        case .accept, .busy, .offer, .pairGrant, .stepDone, .stepFailed, .pushNeed, .pushStored, .pushResult:
            throw RuleBroken(.unexpected, "\(kind.name) is the worker's to send")
        }
    }

    private func isAllowed(_ kind: Kind) -> Bool {
        if kind == .error || kind == .goodbye { return true }
        return switch state {
        case .opening: kind == .inquire || kind == .hello || kind == .pushOffer
        case .serving:
            switch kind {
            case .step, .rewind, .endSession, .cancel, .heartbeat, .ping, .pong: true
            case .refuse: firstServingMessage
            default: false
            }
        case .pushing: kind == .pushData || kind == .heartbeat || kind == .ping || kind == .pong
        case .pairing(let granted): kind == (granted ? .pairStored : .pairRequest)
        case .preamble, .message1, .deciding, .closed: false
        }
    }

    // MARK: answers

    /// Serves the host of the HELLO.
    public mutating func accept(now: Milliseconds) {
        guard case .deciding(.hello(_, let agreed)) = state else { return }
        link.send(.accept(terms), now: now)
        self.agreed = agreed
        books = SessionBooks(agreed)
        state = .serving
        link.beginWaiting(now)
    }

    /// Another host is served.
    public mutating func busy(_ busy: Busy, now: Milliseconds) {
        guard case .deciding = state else { return }
        link.send(.busy(busy), now: now)
        end(.busy(busy))
    }

    public mutating func refuse(_ reason: RefusalReason, _ text: String, now: Milliseconds) {
        if case .closed = state { return }
        link.send(.refuse(Refusal(reason: reason, terms: terms, text: text)), now: now)
        end(.refused(reason, text))
    }

    /// Gives the key of a new pair.
    public mutating func grant(_ key: PairKey, now: Milliseconds) {
        guard case .deciding(.grant) = state else { return }
        link.send(
            .pairGrant(PairGrant(key: key.bytes, name: terms.name, software: terms.software)), now: now)
        state = .pairing(granted: true)
    }

    /// Takes a push: how many bytes of each item are there already.
    public mutating func need(_ have: [UInt64], now: Milliseconds) {
        guard case .deciding(.push(let offer)) = state else { return }
        precondition(have.count == offer.items.count)
        link.send(.pushNeed(have), now: now)
        pushBooks = PushBooks(offer.items, have: have)
        state = .pushing
        link.beginWaiting(now)
    }

    public mutating func stored(item: Int, bytes: UInt64, now: Milliseconds) {
        guard case .pushing = state else { return }
        link.send(.pushStored(item: UInt16(item), bytes: bytes), now: now)
    }

    /// The end of a push. The host closes after it.
    public mutating func pushResult(_ result: PushResult, now: Milliseconds) {
        guard case .pushing = state else { return }
        link.send(.pushResult(result), now: now)
        end(.pushed(result))
    }

    /// All bytes of the push have come.
    public var pushIsComplete: Bool { pushBooks.map { $0.next == nil } ?? false }

    /// A STEP_DONE whose rows are not yet filled in: `rows` bytes at the end are for the stage to write.
    public static func stepDoneBuffer(_ step: Step) -> [UInt8] {
        [UInt8](repeating: 0, count: StepDone.headerBytes + step.rows.hidden.count)
    }

    /// Whether a step need not be evaluated: it was called off, or stands on one that was or that failed. Answer it with
    /// `stepFailed` and no report.
    public func isVoid(_ step: Step) -> Bool {
        calledOff.contains(step.id) || step.spans.contains { broken[$0.session] != nil }
    }

    /// Answers the oldest STEP, which was not evaluated: its sessions are broken until they are rewound.
    public mutating func stepFailed(_ step: Step, _ report: ErrorReport?, now: Milliseconds) {
        guard case .serving = state else { return }
        do {
            try books?.stepFailed(id: step.id)
        } catch {
            preconditionFailure("the worker answers in order: \(error)")
        }
        calledOff.remove(step.id)
        for span in step.spans { broken[span.session] = min(broken[span.session] ?? .max, span.position) }
        link.send(.stepFailed(StepFailed(id: step.id, report: report)), now: now)
    }

    /// A session was rewound, behind the steps before that: what it was before it broke is whole again.
    public mutating func rewound(session: UInt32, to position: UInt32) {
        if let from = broken[session], position <= from { broken[session] = nil }
    }

    /// This side's clock: microseconds since the connection began.
    public func clock(_ now: Milliseconds) -> UInt64 { UInt64(max(0, now - acceptedAt)) * 1000 }

    /// Answers the oldest STEP with a buffer made by `stepDoneBuffer`, the rows written at its end.
    public mutating func stepDone(
        _ message: inout [UInt8], for step: Step, computeMicroseconds: UInt32, waitedMicroseconds: UInt32,
        now: Milliseconds
    ) {
        guard case .serving = state else { return }
        do {
            try books?.stepDone(id: step.id, rows: step.rows.count, format: step.rows.format)
        } catch {
            preconditionFailure("the worker answers in order: \(error)")
        }
        calledOff.remove(step.id)
        var header = Writer(reserving: StepDone.headerBytes)
        header.u8(Kind.stepDone.rawValue)
        header.u8(step.rows.format.rawValue)
        header.u16(0)
        header.u32(UInt32(message.count))
        header.u32(step.id)
        header.u32(UInt32(step.rows.count))
        header.u32(computeMicroseconds)
        header.u32(waitedMicroseconds)
        let ended = clock(now)
        header.u64(ended - min(ended, UInt64(computeMicroseconds)))
        message.replaceSubrange(0..<StepDone.headerBytes, with: header.bytes)
        link.send(encoded: message, now: now)
    }

    public mutating func heartbeat(_ beat: Heartbeat, now: Milliseconds) {
        guard isEncrypted else { return }
        link.send(.heartbeat(beat), now: now)
    }

    public mutating func ping(_ number: UInt64, now: Milliseconds) {
        guard ping == nil, isServing else { return }
        ping = number
        link.send(.ping(number), now: now)
    }

    /// Says GOODBYE and closes.
    public mutating func goodbye(_ reason: GoodbyeReason, now: Milliseconds) {
        if isEncrypted { link.send(.goodbye(reason), now: now) }
        if case .closed = state { return }
        end(.left(reason))
    }

    /// Says ERROR about the worker's own work and closes.
    public mutating func fail(_ report: ErrorReport, now: Milliseconds) {
        if isEncrypted { link.send(.error(report), now: now) }
        if case .closed = state { return }
        end(.failed(report))
    }

    // MARK: out

    /// Bytes to be sent.
    public var output: [UInt8] { link.output }

    /// `output` was sent whole.
    public mutating func sent() { link.output.removeAll(keepingCapacity: true) }

    public var isClosed: Bool {
        if case .closed = state { true } else { false }
    }

    public var isServing: Bool {
        switch state {
        case .serving, .pushing: true
        default: false
        }
    }

    /// In the handshake: counts towards the limit of handshakes under way.
    public var isHandshaking: Bool {
        switch state {
        case .preamble, .message1: true
        default: false
        }
    }

    private var isEncrypted: Bool {
        switch state {
        case .opening, .deciding, .serving, .pushing, .pairing: true
        case .preamble, .message1, .closed: false
        }
    }

    // MARK: times

    /// Until when `poll` must be called again at the latest; nil = whenever bytes come.
    public func nextWake() -> Milliseconds? {
        switch (deadline, heartbeatWanted ? link.heartbeatDue : nil) {
        case (let deadline?, let beat?): min(deadline, beat)
        case (let deadline, let beat): deadline ?? beat
        }
    }

    /// Nothing was sent for so long that a HEARTBEAT is due.
    public func heartbeatDue(now: Milliseconds) -> Bool { heartbeatWanted && now >= link.heartbeatDue }

    private var heartbeatWanted: Bool {
        switch state {
        case .serving, .pushing, .deciding: true
        default: false
        }
    }

    private var deadline: Milliseconds? {
        switch state {
        case .preamble, .message1: acceptedAt + Time.preamble
        case .opening, .pairing: acceptedAt + Time.opening
        case .serving, .pushing: link.silenceDeadline
        case .deciding, .closed: nil
        }
    }

    private mutating func checkDeadline(_ now: Milliseconds) throws(RuleBroken) {
        guard let deadline, now >= deadline else { return }
        if isEncrypted {
            link.send(.error(ErrorReport(code: .deadline, text: "nothing came in time")), now: now)
        }
        throw RuleBroken(.deadline, "nothing came in time")
    }

    // MARK: ends

    private mutating func answer(_ status: HandshakeStatus, _ now: Milliseconds) {
        link.sendClear(Answer(status: status).encoded(), now: now)
    }

    /// Tells the peer where the protocol has an answer, and closes.
    private mutating func broken(_ error: RuleBroken, _ now: Milliseconds) {
        if error.rule == .pushItems, isEncrypted {
            link.send(.refuse(Refusal(reason: .pushItems, terms: terms, text: error.detail)), now: now)
        } else if let code = error.rule.answer, isEncrypted {
            link.send(.error(ErrorReport(code: code, text: error.description)), now: now)
        }
        end(.broken(error))
    }

    private mutating func end(_ ending: Ending) {
        state = .closed
        link.input.drop()
        pending.append(.closed(ending))
    }
}

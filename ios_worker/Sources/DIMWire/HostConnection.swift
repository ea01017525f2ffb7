// The host's end of one connection as a state machine, the mirror of WorkerConnection. In this package it is what the
// worker's tests talk through, and what a Swift host would be built on; the product's host is the Rust one.
import DIMCrypto

public enum HostEvent: Equatable, Sendable {
    /// the worker has the key; the name is for logs
    case handshaken(connection: String)
    case offered(Terms)
    /// the worker's terms fit: serving begins
    case accepted(Terms, Agreed)
    case stepDone(StepDone)
    case stepFailed(StepFailed)
    case granted(PairGrant)
    /// how many bytes of each item the worker has
    case needs([UInt64])
    case stored(item: Int, bytes: UInt64)
    case heartbeat(Heartbeat)
    case pong(UInt64, clock: UInt64)
    case closed(Ending)
}

public struct HostConnection {
    /// What the host came for.
    public enum Purpose: Sendable {
        case serve(Terms)
        case push(PushOffer)
        case pair(name: String, software: String)
        /// INQUIRE first, then whatever `proceed` is told
        case inquire
    }

    private enum State {
        case greeting
        /// the worker has greeted, and the first flight is sent
        case answer(NoiseInitiator, Greeting)
        case message2(clear: [UInt8], Answer, NoiseInitiator)
        /// INQUIRE sent, or nothing yet
        case opening(hello: Terms?)
        case serving
        /// PUSH_OFFER sent; true once PUSH_NEED has come
        case pushing(PushOffer, needed: Bool)
        case pairing
        case closed
    }

    private var state = State.greeting
    var link: Link
    private let dialledAt: Milliseconds
    private let key: PairKey
    private let salt: [UInt8]
    private let ephemeral: [UInt8]
    private let purpose: Purpose
    private let versions: ClosedRange<UInt16>
    private var chosen: UInt16 = 0
    private var inquired = 0
    private var heartbeatsCame = false
    private var agreed: Agreed?
    private var books: SessionBooks?
    private var ping: UInt64?
    private var pending: [HostEvent] = []

    /// Nothing is said before the worker has greeted.
    public init(
        purpose: Purpose, key: PairKey, dialledAt: Milliseconds, salt: [UInt8] = randomBytes(KeyMark.saltBytes),
        ephemeral: [UInt8] = randomBytes(keyBytes), versions: ClosedRange<UInt16> = protocolVersion...protocolVersion
    ) {
        self.purpose = purpose
        self.key = key
        self.salt = salt
        self.ephemeral = ephemeral
        self.dialledAt = dialledAt
        self.versions = versions
        link = Link(now: dialledAt)
    }

    /// The worker greets: the first flight.
    private mutating func readGreeting(_ now: Milliseconds) throws(RuleBroken) -> Bool {
        for index in 0..<min(link.input.count, Preamble.magic.count)
        where link.input[index] != Preamble.magic[index] {
            throw RuleBroken(.badMagic, "byte \(index) is \(link.input[index])")
        }
        guard link.input.count >= Greeting.bytes else { return false }
        let bytes = link.input.take(Greeting.bytes)
        let greeting = try Greeting(bytes)
        guard versions.overlaps(greeting.lowest...greeting.highest) else {
            throw RuleBroken(
                .version, "the worker speaks \(greeting.lowest)-\(greeting.highest), this host \(versions)")
        }
        var pairing = false
        if case .pair = purpose { pairing = true }
        let preamble = Preamble(
            lowest: versions.lowerBound, highest: versions.upperBound, purpose: pairing ? .pairing : .paired,
            mark: KeyMark(of: key, nonce: greeting.nonce, salt: salt)
        ).encoded()
        let noise = NoiseInitiator(
            prologue: noisePrologue(greeting: bytes, preamble: preamble), psk: key.bytes, ephemeral: ephemeral)
        var flight = Writer(reserving: Preamble.bytes + 2 + message1Bytes)
        flight.array(preamble)
        flight.u16(UInt16(noise.message1.count))
        flight.array(noise.message1)
        link.sendClear(flight.bytes, now: now)
        state = .answer(noise, greeting)
        return true
    }

    // MARK: in

    @discardableResult
    public mutating func receive(now: Milliseconds, _ fill: (UnsafeMutableRawBufferPointer) -> Int) -> Int {
        link.receive(now: now, fill)
    }

    public mutating func disconnected() {
        if case .closed = state { return }
        end(.lost)
    }

    // MARK: events

    public mutating func poll(now: Milliseconds) -> HostEvent? {
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

    private mutating func advance(_ now: Milliseconds) throws(RuleBroken) -> Bool {
        switch state {
        case .closed: return false
        case .greeting: return try readGreeting(now)
        case .answer(let noise, let greeted): return try readAnswer(noise, greeted)
        case .message2(let clear, let answer, let noise): return try readMessage2(clear, answer, noise, now)
        case .opening, .serving, .pushing, .pairing:
            guard let message = try link.nextMessage(limit: limit) else { return false }
            try take(message, now)
            return true
        }
    }

    private mutating func readAnswer(_ noise: NoiseInitiator, _ greeted: Greeting) throws(RuleBroken) -> Bool {
        guard link.input.count >= Answer.bytes else { return false }
        let clear = link.input.take(Answer.bytes)
        let answer = try Answer(clear)
        guard answer.lowest == greeted.lowest, answer.highest == greeted.highest else {
            throw RuleBroken(.badAnswer, "other versions than it greeted with")
        }
        if let rule = answer.status.rule {
            throw RuleBroken(rule, "the worker (versions \(answer.lowest)-\(answer.highest)) refused the handshake")
        }
        guard versions.contains(answer.chosen), answer.chosen == min(versions.upperBound, answer.highest) else {
            throw RuleBroken(
                .badAnswer, "version \(answer.chosen) is not the highest of \(versions) and \(answer.highest)")
        }
        state = .message2(clear: clear, answer, noise)
        return true
    }

    private mutating func readMessage2(
        _ clear: [UInt8], _ answer: Answer, _ noise: NoiseInitiator, _ now: Milliseconds
    ) throws(RuleBroken) -> Bool {
        guard link.input.count >= 2 else { return false }
        let length = Int(link.input[0]) | Int(link.input[1]) << 8
        guard length == message2Bytes else { throw RuleBroken(.noiseLength, "message 2 of \(length) bytes") }
        guard link.input.count >= 2 + length else { return false }
        let message2 = Array(link.input.take(2 + length).dropFirst(2))
        let payload: [UInt8]
        let transport: NoiseTransport
        do throws(NoiseError) {
            var noise = noise
            (payload, transport) = try noise.readMessage2(message2)
        } catch .zeroResult {
            throw RuleBroken(.zeroDH, "the worker's ephemeral key is a point of small order")
        } catch {
            throw RuleBroken(.key, "message 2 was not made with this key")
        }
        guard payload == clear else { throw RuleBroken(.answerChanged, "somebody altered the worker's answer") }
        link.startEncryption(receiving: transport.workerKey, sending: transport.hostKey)
        chosen = answer.chosen
        pending.append(.handshaken(connection: transport.name))
        state = .opening(hello: nil)
        switch purpose {
        case .inquire: inquire(now: now)
        case .serve(let terms): hello(terms, now: now)
        case .push(let offer): push(offer, now: now)
        case .pair(let name, let software):
            link.send(.pairRequest(name: name, software: software), now: now)
            state = .pairing
        }
        return true
    }

    private var limit: Int {
        switch state {
        case .serving: agreed?.workerMessageLimit ?? Limit.openingMessage
        default: Limit.openingMessage
        }
    }

    private mutating func take(_ message: [UInt8], _ now: Milliseconds) throws(RuleBroken) {
        let kind = try Message.kind(of: message)
        guard isAllowed(kind) else { throw RuleBroken(.unexpected, "\(kind.name) is not allowed here") }
        switch try Message(decoding: message, shape: agreed?.shape ?? Shape()) {
        case .offer(let terms):
            inquired -= 1
            pending.append(.offered(terms))
        case .accept(let worker):
            guard case .opening(let host?) = state else { return }
            do throws(Mismatch) {
                let agreed = try Agreed(host: host, worker: worker, chosen: chosen)
                self.agreed = agreed
                books = SessionBooks(agreed)
                state = .serving
                pending.append(.accepted(worker, agreed))
            } catch {
                link.send(.refuse(Refusal(reason: error.reason, terms: host, text: error.text)), now: now)
                end(.refused(error.reason, error.text))
            }
        case .refuse(let refusal): end(.refusedByPeer(refusal))
        case .busy(let busy): end(.busy(busy))
        case .pairGrant(let grant):
            link.send(.pairStored, now: now)
            pending.append(.granted(grant))
            end(.paired)
        case .stepDone(let done):
            try books?.stepDone(id: done.id, rows: done.rows.count, format: done.rows.format)
            let bad = done.rows.nonFiniteCount(agreed?.shape.output ?? Layout())
            guard bad == 0 else { throw RuleBroken(.nonFinite, "\(bad) values of step \(done.id) are not finite") }
            pending.append(.stepDone(done))
        case .stepFailed(let failed):
            try books?.stepFailed(id: failed.id)
            pending.append(.stepFailed(failed))
        case .heartbeat(let beat):
            heartbeatsCame = true
            pending.append(.heartbeat(beat))
        case .ping(let number):
            link.send(.pong(number, clock: UInt64(max(0, now - dialledAt)) * 1000), now: now)
        case .pong(let number, let clock):
            guard ping == number else { return }
            ping = nil
            pending.append(.pong(number, clock: clock))
        case .error(let report): end(.peerFailed(report))
        case .goodbye(let reason): end(.goodbye(reason))
        case .pushNeed(let have):
            guard case .pushing(let offer, needed: false) = state else { return }
            guard have.count == offer.items.count, zip(have, offer.items).allSatisfy({ $0 <= $1.size }) else {
                throw RuleBroken(.badValue, "PUSH_NEED does not fit the PUSH_OFFER")
            }
            state = .pushing(offer, needed: true)
            pending.append(.needs(have))
        case .pushStored(let item, let bytes): pending.append(.stored(item: Int(item), bytes: bytes))
        case .pushResult(let result): end(.pushed(result))
        case .hello, .inquire, .step, .rewind, .endSession, .cancel, .pairRequest, .pairStored, .pushOffer, .pushData:
            throw RuleBroken(.unexpected, "\(kind.name) is the host's to send")
        }
    }

    private func isAllowed(_ kind: Kind) -> Bool {
        if kind == .error || kind == .goodbye { return true }
        return switch state {
        case .opening(let hello):
            switch kind {
            case .offer: inquired > 0
            case .accept, .busy, .refuse: hello != nil
            case .heartbeat: true
            default: false
            }
        case .serving:
            kind == .stepDone || kind == .stepFailed || kind == .heartbeat || kind == .ping || kind == .pong
        case .pushing(_, let needed):
            switch kind {
            case .heartbeat, .ping, .pong: true
            case .pushNeed, .refuse, .busy: !needed
            case .pushStored, .pushResult: needed
            default: false
            }
        case .pairing: kind == .pairGrant
        case .greeting, .answer, .message2, .closed: false
        }
    }

    // MARK: what the host says

    public mutating func inquire(now: Milliseconds) {
        inquired += 1
        link.send(.inquire, now: now)
    }

    public mutating func hello(_ terms: Terms, now: Milliseconds) {
        var terms = terms
        terms.version = chosen
        link.send(.hello(terms), now: now)
        state = .opening(hello: terms)
    }

    public mutating func push(_ offer: PushOffer, now: Milliseconds) {
        link.send(.pushOffer(offer), now: now)
        state = .pushing(offer, needed: false)
    }

    /// Sends a STEP with the next id; throws what the worker would refuse, before anything is sent.
    @discardableResult
    public mutating func step(
        spans: [Span], tokens: [Int32] = [], rows: Rows, now: Milliseconds
    ) throws(RuleBroken) -> UInt32 {
        guard var books else { throw RuleBroken(.unexpected, "no worker has accepted") }
        let id = books.nextID
        try books.step(id: id, rows: rows.count, format: rows.format, spans: spans)
        self.books = books
        link.send(.step(Step(id: id, spans: spans, tokens: tokens, rows: rows)), now: now)
        return id
    }

    public mutating func rewind(session: UInt32, position: UInt32, now: Milliseconds) throws(RuleBroken) {
        try books?.rewind(session: session, position: position)
        link.send(.rewind(session: session, position: position), now: now)
    }

    /// Nobody wants the answer to this step any more.
    public mutating func cancel(step: UInt32, now: Milliseconds) { link.send(.cancel(step), now: now) }

    public mutating func end(session: UInt32, now: Milliseconds) throws(RuleBroken) {
        try books?.end(session: session)
        link.send(.endSession(session), now: now)
    }

    public mutating func pushData(_ data: PushData, now: Milliseconds) { link.send(.pushData(data), now: now) }

    public mutating func heartbeat(now: Milliseconds) { link.send(.heartbeat(Heartbeat()), now: now) }

    public mutating func ping(_ number: UInt64, now: Milliseconds) {
        guard ping == nil else { return }
        ping = number
        link.send(.ping(number), now: now)
    }

    public mutating func goodbye(_ reason: GoodbyeReason, now: Milliseconds) {
        if case .closed = state { return }
        if isEncrypted { link.send(.goodbye(reason), now: now) }
        end(.left(reason))
    }

    // MARK: out, times

    public var output: [UInt8] { link.output }

    public mutating func sent() { link.output.removeAll(keepingCapacity: true) }

    public var isClosed: Bool {
        if case .closed = state { true } else { false }
    }

    public func nextWake() -> Milliseconds? {
        switch (deadline, isServing ? link.heartbeatDue : nil) {
        case (let deadline?, let beat?): min(deadline, beat)
        case (let deadline, let beat): deadline ?? beat
        }
    }

    public func heartbeatDue(now: Milliseconds) -> Bool { isServing && now >= link.heartbeatDue }

    private var isServing: Bool {
        switch state {
        case .serving, .pushing(_, needed: true): true
        default: false
        }
    }

    private var isEncrypted: Bool {
        switch state {
        case .opening, .serving, .pushing, .pairing: true
        case .greeting, .answer, .message2, .closed: false
        }
    }

    private var deadline: Milliseconds? {
        switch state {
        case .greeting, .answer, .message2, .pairing: dialledAt + Time.opening
        case .opening, .pushing(_, needed: false):
            heartbeatsCame
                ? min(dialledAt + Time.openingWithHeartbeats, link.silenceDeadline) : dialledAt + Time.opening
        case .serving, .pushing: link.silenceDeadline
        case .closed: nil
        }
    }

    private mutating func checkDeadline(_ now: Milliseconds) throws(RuleBroken) {
        guard let deadline, now >= deadline else { return }
        throw RuleBroken(.deadline, "nothing came in time")
    }

    // MARK: ends

    private mutating func broken(_ error: RuleBroken, _ now: Milliseconds) {
        if let code = error.rule.answer, isEncrypted {
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

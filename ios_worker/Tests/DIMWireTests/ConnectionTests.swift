// Whole connections in memory: what is allowed when, what each side concludes, when time runs out.
import DIMCrypto
import Testing

@testable import DIMWire

@Suite struct ConnectionTests {
    @Test(arguments: [1, 2, 7, 23, 24, 25, 64, 1000, Int.max])
    func servesHoweverTheBytesAreSplit(piece: Int) throws {
        var pair = Pair()
        pair.piece = piece
        pair.run()
        for step in 0..<5 {
            try pair.host.step(
                spans: [Span(session: 0, position: UInt32(3 * step), count: 3)],
                rows: f16Rows(3, first: step), now: pair.now)
            pair.run()
            guard case .step(let received) = pair.workerEvents.last else {
                Issue.record("no STEP came: \(pair.workerEvents)")
                return
            }
            #expect(received.rows == f16Rows(3, first: step))
            var answer = WorkerConnection.stepDoneBuffer(received)
            answer.replaceSubrange(StepDone.headerBytes..., with: received.rows.hidden)
            pair.worker.stepDone(
                &answer, for: received, computeMicroseconds: 5, waitedMicroseconds: 6, now: pair.now)
            pair.run()
            guard case .stepDone(let done) = pair.hostEvents.last else {
                Issue.record("no STEP_DONE came: \(pair.hostEvents)")
                return
            }
            #expect(done.id == UInt32(step + 1))
            #expect(done.rows == received.rows)
            #expect((done.computeMicroseconds, done.waitedMicroseconds) == (5, 6))
        }
        try pair.host.rewind(session: 0, position: 4, now: pair.now)
        try pair.host.end(session: 1, now: pair.now)
        pair.host.goodbye(.finished, now: pair.now)
        pair.run()
        #expect(
            Array(pair.workerEvents.suffix(3)) == [
                .rewind(session: 0, position: 4), .endSession(1), .closed(.goodbye(.finished)),
            ])
    }

    @Test func bytesPerTokenAreThoseOfTheDocument() throws {
        let nEmbd = 3584
        var host = Terms.ofHost
        var worker = Terms.ofWorker
        host.shape = .hidden(nEmbd)
        worker.shape = .hidden(nEmbd)
        var pair = Pair.serving(host: host, worker: worker)
        try pair.host.step(
            spans: [Span(session: 0, position: 0, count: 1)], rows: f16Rows(1, nEmbd: nEmbd), now: pair.now)
        #expect(pair.host.output.count == 2 * nEmbd + 50)
        pair.run()
        guard case .step(let step) = pair.workerEvents.last else { return missed("no STEP came") }
        var answer = WorkerConnection.stepDoneBuffer(step)
        pair.worker.stepDone(&answer, for: step, computeMicroseconds: 0, waitedMicroseconds: 0, now: pair.now)
        #expect(pair.worker.output.count == 2 * nEmbd + 50)
    }

    @Test func messagesOfManyFramesArrive() throws {
        var host = Terms.ofHost
        var worker = Terms.ofWorker
        for size in [4093, 8190, 9000] {
            host.shape = .hidden(size)
            worker.shape = .hidden(size)
            var pair = Pair.serving(host: host, worker: worker)
            let rows = f16Rows(8, nEmbd: size)
            try pair.host.step(spans: [Span(session: 1, position: 0, count: 8)], rows: rows, now: pair.now)
            pair.run()
            guard case .step(let step) = pair.workerEvents.last else { return missed("no STEP came") }
            #expect(step.rows == rows)
        }
    }

    @Test func retiredRowFormatsAreRefused() throws {
        for retired: UInt8 in [3, 0x81, 0x82] {
            #expect(RowFormat(rawValue: retired) == nil)
            var one = Pair.serving()
            let spans = [Span(session: 0, position: 0, count: 1)]
            var bytes = Message.step(Step(id: 1, spans: spans, rows: f16Rows(1))).encoded()
            bytes[1] = retired
            one.host.send(unchecked: bytes, now: one.now)
            one.run()
            #expect(one.brokenAtWorker == .badValue)
            #expect(one.codeAtHost == .malformed)
        }
    }

    @Test func inquiresAreAnsweredFourTimes() {
        var pair = Pair(.inquire)
        pair.run()
        for _ in 0..<3 {
            pair.host.inquire(now: pair.now)
            pair.run()
        }
        #expect(pair.hostEvents.filter { if case .offered = $0 { true } else { false } }.count == 4)
        pair.host.hello(.ofHost, now: pair.now)
        pair.run()
        #expect(pair.worker.isServing)

        var greedy = Pair(.inquire)
        greedy.run()
        for _ in 0..<4 { greedy.host.inquire(now: greedy.now) }
        greedy.run()
        #expect(greedy.brokenAtWorker == .unexpected)
    }

    @Test func theOfferSaysWhatTheWorkerHolds() {
        var pair = Pair(.inquire)
        pair.run()
        #expect(pair.hostEvents.contains(.offered(.ofWorker)))
    }

    @Test func aSecondHostHearsWhoIsServed() {
        var pair = Pair()
        pair.accepting = false
        pair.run()
        let busy = Busy(since: 1234, host: "a desk")
        pair.worker.busy(busy, now: pair.now)
        pair.run()
        #expect(pair.hostEnding == .busy(busy))
        #expect(pair.worker.isClosed)
    }

    @Test func aRefusalCarriesTermsAndASentence() {
        var terms = Terms.ofHost
        terms.lastBlock = 15
        var pair = Pair(.serve(terms))
        pair.run()
        guard case .refusedByPeer(let refusal) = pair.hostEnding else {
            return missed("not refused: \(String(describing: pair.hostEnding))")
        }
        #expect(refusal.reason == .blocks)
        #expect(refusal.terms == .ofWorker)
        #expect(refusal.text == "the host needs blocks 11..15, the worker holds 11..16")
        #expect(pair.workerEnding == .refused(.blocks, refusal.text))
    }

    @Test func aHostThatFindsOtherTermsInTheAcceptRefuses() {
        var pair = Pair()
        pair.run()
        // a second worker that accepts whatever it is asked
        var liar = Pair(.serve(.ofHost))
        liar.accepting = false
        liar.run()
        var other = Terms.ofWorker
        other.slice = Digest([UInt8](repeating: 9, count: 32))!
        liar.worker.answerHello(with: other, now: liar.now)
        liar.run()
        #expect(liar.hostEnding.map { if case .refused(.slice, _) = $0 { true } else { false } } == true)
        guard case .refusedByPeer(let refusal) = liar.workerEnding else {
            return missed("the worker did not hear it: \(String(describing: liar.workerEnding))")
        }
        #expect(refusal.reason == .slice)
    }

    // MARK: handshake

    @Test func strangersAreRefused() {
        let wrong = PairKey([UInt8](repeating: 1, count: 32))!
        var unknown = Pair(key: wrong)
        unknown.run()
        #expect(unknown.brokenAtWorker == .key)
        #expect(unknown.brokenAtHost == .key)

        var noWindow = Pair(.pair(name: "x", software: "y"), key: wrong)
        noWindow.run()
        #expect(noWindow.brokenAtHost == .noPairing)

        var wrongCode = Pair(
            .pair(name: "x", software: "y"), key: wrong, secrets: WorkerSecrets(pairing: Pair.key))
        wrongCode.run()
        #expect(wrongCode.brokenAtHost == .key)
        #expect(wrongCode.brokenAtWorker == .key)

        var crowded = Pair(crowded: true)
        crowded.run()
        #expect(crowded.brokenAtHost == .crowded)

        var future = Pair(versions: 3...4)
        future.run()
        #expect(future.brokenAtHost == .version)
        #expect(future.worker.output.isEmpty)
    }

    @Test func theHighestCommonVersionIsChosen() {
        var pair = Pair(versions: 1...9)
        pair.run()
        #expect(pair.worker.isServing)
    }

    @Test func everyAlteredBitOfTheFirstFlightsIsNoticed() {
        for bit in 0..<Greeting.bytes * 8 {
            var pair = Pair()
            var greeting = pair.worker.output
            #expect(greeting.count == 32)
            greeting[bit / 8] ^= 1 << UInt8(bit % 8)
            pair.worker.sent()
            pair.deliver(toHost: greeting)
            pair.run()
            #expect(!pair.worker.isServing, "bit \(bit) of the greeting")
        }
        for bit in 0..<82 * 8 {
            var pair = Pair()
            var flight = pair.greeted()
            #expect(flight.count == 82)
            flight[bit / 8] ^= 1 << UInt8(bit % 8)
            pair.host.sent()
            pair.deliver(toWorker: flight)
            pair.run()
            #expect(!pair.worker.isServing, "bit \(bit) of the host's flight")
        }
        for bit in 0..<98 * 8 {
            var pair = Pair()
            let flight = pair.greeted()
            pair.deliver(toWorker: flight)
            var answer = pair.worker.output
            #expect(answer.count == 98)
            pair.worker.sent()
            answer[bit / 8] ^= 1 << UInt8(bit % 8)
            pair.deliver(toHost: answer)
            #expect(pair.brokenAtHost != nil || !pair.host.isClosed)
            #expect(!pair.hostEvents.contains { if case .handshaken = $0 { true } else { false } }, "bit \(bit)")
        }
    }

    @Test func aWorkerSaysNothingToOtherProtocols() {
        for text in ["GET / HTTP/1.1\r\n\r\n", "\u{16}\u{03}\u{01}hello", "SSH-2.0-x\r\n"] {
            var pair = Pair()
            _ = pair.greeted()
            pair.deliver(toWorker: Array(text.utf8))
            #expect(pair.brokenAtWorker == .badMagic)
            #expect(pair.worker.output.isEmpty)
        }
    }

    // MARK: frames and messages that must be refused

    @Test func everyAlteredBitOfAFrameEndsTheConnection() throws {
        let template = Pair.serving()
        var length = 0
        for bit in 0..<1000 {
            var pair = template
            // a copy of the pair shares the ciphers, but each frame number is set anew
            try pair.host.step(spans: [Span(session: 0, position: 0, count: 1)], rows: f16Rows(1), now: pair.now)
            var frame = pair.host.output
            length = frame.count
            guard bit < length * 8 else { break }
            frame[bit / 8] ^= 1 << UInt8(bit % 8)
            pair.host.sent()
            pair.deliver(toWorker: frame)
            #expect(!pair.workerEvents.contains { if case .step = $0 { true } else { false } }, "bit \(bit)")
            let known: [Rule?] = [.badTag, .frameLength, .tooLong]
            if bit >= 16 {
                #expect(pair.brokenAtWorker == .badTag)
            } else {
                // another length: refused at once, or bytes are awaited that do not come
                #expect(known.contains(pair.brokenAtWorker) || pair.brokenAtWorker == nil)
            }
        }
        #expect(length == 2 * 8 + 50)
    }

    @Test func repeatedReorderedAndReflectedFramesAreRefused() throws {
        func frames(_ pair: inout Pair, _ count: Int) throws -> [[UInt8]] {
            try (0..<count).map { index in
                try pair.host.step(
                    spans: [Span(session: 0, position: UInt32(index), count: 1)], rows: f16Rows(1), now: pair.now)
                defer { pair.host.sent() }
                return pair.host.output
            }
        }
        var repeated = Pair.serving()
        let once = try frames(&repeated, 1)
        repeated.deliver(toWorker: once[0] + once[0])
        #expect(repeated.brokenAtWorker == .badTag)

        var reordered = Pair.serving()
        let two = try frames(&reordered, 2)
        reordered.deliver(toWorker: two[1] + two[0])
        #expect(reordered.brokenAtWorker == .badTag)

        var reflected = Pair.serving()
        let sent = try frames(&reflected, 1)
        reflected.deliver(toHost: sent[0])
        #expect(reflected.brokenAtHost == .badTag)

        var spliced = Pair.serving()
        var other = Pair.serving()
        spliced.deliver(toWorker: try frames(&other, 1)[0])
        #expect(spliced.brokenAtWorker == .badTag)
    }

    @Test func aFrameLongerThanTheLimitIsRefusedFromItsTwoBytes() {
        var pair = Pair.serving()
        pair.deliver(toWorker: [0xFF, 0xFF])
        #expect(pair.brokenAtWorker == .tooLong)
        var short = Pair.serving()
        short.deliver(toWorker: [23, 0])
        #expect(short.brokenAtWorker == .frameLength)
    }

    @Test func aMessageLongerThanTheLimitIsRefusedFromItsHeader() {
        for announced in [UInt32(4097), 1 << 20, .max] {
            var pair = Pair.serving()
            var message = [UInt8](repeating: 0, count: 4096)
            message[0] = Kind.step.rawValue
            for index in 0..<4 { message[4 + index] = UInt8(truncatingIfNeeded: announced >> (8 * UInt32(index))) }
            pair.host.send(unchecked: message, now: pair.now)
            pair.run()
            #expect(pair.brokenAtWorker == .tooLong)
            #expect(pair.codeAtHost == .malformed)
        }
    }

    @Test func aHeaderThatDoesNotFitItsFrameIsRefused() {
        var pair = Pair.serving()
        var message = Message.ping(1).encoded()
        message[4] = 17
        pair.host.send(unchecked: message, now: pair.now)
        pair.run()
        #expect(pair.brokenAtWorker == .frameLength)
        #expect(pair.worker.output.isEmpty)
    }

    @Test(arguments: Kind.allCases)
    func messagesOutOfPlaceAreUnexpected(kind: Kind) {
        let allowed: [Kind] = [
            .step, .rewind, .endSession, .cancel, .heartbeat, .ping, .pong, .refuse, .error, .goodbye,
        ]
        guard !allowed.contains(kind) else { return }
        var pair = Pair.serving()
        var message: [UInt8] = [kind.rawValue, 0, 0, 0, 8, 0, 0, 0]
        if kind == .pushOffer { message[2] = 1 }
        pair.host.send(unchecked: message, now: pair.now)
        pair.run()
        #expect(pair.brokenAtWorker == .unexpected)
        #expect(pair.codeAtHost == .unexpected)
    }

    @Test func refuseIsAllowedOnlyAsTheHostsFirstMessage() {
        let refuse = Message.refuse(Refusal(reason: .slice, terms: .ofHost, text: "no")).encoded()
        var first = Pair.serving()
        first.host.send(unchecked: refuse, now: first.now)
        first.run()
        #expect(first.workerEnding.map { if case .refusedByPeer = $0 { true } else { false } } == true)

        var later = Pair.serving()
        later.host.heartbeat(now: later.now)
        later.host.send(unchecked: refuse, now: later.now)
        later.run()
        #expect(later.brokenAtWorker == .unexpected)
    }

    @Test func anUnknownKindIsMalformed() {
        var pair = Pair.serving()
        pair.host.send(unchecked: [0x7F, 0, 0, 0, 8, 0, 0, 0], now: pair.now)
        pair.run()
        #expect(pair.brokenAtWorker == .unknownKind)
        #expect(pair.codeAtHost == .malformed)
    }

    @Test func aPongOfAnotherPingIsIgnored() {
        var pair = Pair.serving()
        pair.worker.ping(5, now: pair.now)
        pair.host.send(unchecked: Message.pong(4, clock: 1).encoded(), now: pair.now)
        pair.run()
        pair.host.send(unchecked: Message.pong(5, clock: 1).encoded(), now: pair.now)
        pair.run()
        #expect(pair.worker.isServing)
    }

    @Test func pingsAreAnsweredAheadOfSteps() throws {
        var pair = Pair.serving()
        try pair.host.step(spans: [Span(session: 0, position: 0, count: 1)], rows: f16Rows(1), now: pair.now)
        pair.host.ping(42, now: pair.now)
        pair.run()
        #expect(pair.hostEvents.last == .pong(42, clock: 0))
    }

    @Test func aPongSaysTheClockOfWhoAnswers() {
        var pair = Pair.serving()
        pair.now += 7
        pair.host.ping(42, now: pair.now)
        pair.run()
        #expect(pair.hostEvents.last == .pong(42, clock: 7000))
        #expect(pair.worker.clock(pair.now) == 7000)
    }

    // MARK: steps without rows

    /// Answers the STEP that came last with its own rows, or as void.
    private func answer(_ pair: inout Pair, _ step: Step, failing report: ErrorReport? = nil) {
        if pair.worker.isVoid(step) || report != nil {
            pair.worker.stepFailed(step, pair.worker.isVoid(step) ? nil : report, now: pair.now)
        } else {
            var answer = WorkerConnection.stepDoneBuffer(step)
            answer.replaceSubrange(StepDone.headerBytes..., with: step.rows.hidden)
            pair.worker.stepDone(
                &answer, for: step, computeMicroseconds: 0, waitedMicroseconds: 0, now: pair.now)
        }
        pair.run()
    }

    private func steps(_ pair: Pair) -> [Step] {
        pair.workerEvents.compactMap { if case .step(let step) = $0 { step } else { nil } }
    }

    @Test func aStepThatFailsBreaksItsSessionUntilItIsRewound() throws {
        var pair = Pair.serving()
        func send(_ session: UInt32, _ position: UInt32) throws {
            try pair.host.step(
                spans: [Span(session: session, position: position, count: 1)], rows: f16Rows(1), now: pair.now)
            pair.run()
        }
        try send(0, 0)
        try send(0, 1)
        var report = ErrorReport(code: .nonFinite, text: "a value")
        report.block = 12
        report.count = 1
        answer(&pair, steps(pair)[0], failing: report)
        report.step = 1
        #expect(pair.hostEvents.last == .stepFailed(StepFailed(id: 1, report: report)))
        answer(&pair, steps(pair)[1])
        #expect(pair.hostEvents.last == .stepFailed(StepFailed(id: 2, report: nil)), "it stands on the one that failed")
        try send(1, 0)
        answer(&pair, steps(pair)[2])
        #expect(pair.hostEvents.last.map { if case .stepDone = $0 { true } else { false } } == true)
        // behind the failed row it stays broken, at it it is whole
        try pair.host.rewind(session: 0, position: 1, now: pair.now)
        pair.run()
        pair.worker.rewound(session: 0, to: 1)
        try send(0, 1)
        answer(&pair, steps(pair)[3])
        #expect(pair.hostEvents.last == .stepFailed(StepFailed(id: 4, report: nil)))
        try pair.host.rewind(session: 0, position: 0, now: pair.now)
        pair.run()
        pair.worker.rewound(session: 0, to: 0)
        try send(0, 0)
        answer(&pair, steps(pair)[4])
        #expect(pair.hostEvents.last.map { if case .stepDone = $0 { true } else { false } } == true)
    }

    @Test func aStepIsCalledOffBeforeItsTurn() throws {
        var pair = Pair.serving()
        for position in 0..<2 {
            try pair.host.step(
                spans: [Span(session: 0, position: UInt32(position), count: 1)], rows: f16Rows(1), now: pair.now)
        }
        pair.host.cancel(step: 2, now: pair.now)
        // never sent, and answered long ago
        pair.host.cancel(step: 77, now: pair.now)
        pair.host.cancel(step: 0, now: pair.now)
        pair.run()
        #expect(steps(pair).map { pair.worker.isVoid($0) } == [false, true])
        answer(&pair, steps(pair)[0])
        answer(&pair, steps(pair)[1])
        #expect(pair.hostEvents.last == .stepFailed(StepFailed(id: 2, report: nil)))
        pair.host.cancel(step: 2, now: pair.now)
        pair.run()
        #expect(pair.worker.isServing)
    }

    @Test func rowsOfSeveralPartsAreRefusedAndTheSideToFixIsNamed() {
        var terms = Terms.ofHost
        terms.shape.input.parts.append(Part(.i32, values: 3))
        terms.shape.readsTokens = true
        var pair = Pair(.serve(terms))
        pair.run()
        guard case .refusedByPeer(let refusal) = pair.hostEnding else {
            return missed("not refused: \(String(describing: pair.hostEnding))")
        }
        #expect(refusal.reason == .layout)
        #expect(
            refusal.text == "the host's rows are 8 f32 + 3 i32 in and 8 f32 out, with token ids, the worker's 8 f32 in "
                + "and 8 f32 out: use slices of one split on both sides, and give the worker the right one")
    }

    @Test func rowsOfSeveralPartsGoBothWays() throws {
        // both ends of this package can, though its stages have one hidden row
        var worker = Terms.ofWorker
        worker.shape = Shape(
            input: Layout([Part(.f32, mayRound: true, values: 4), Part(.i32, values: 1)]), output: .hidden(4),
            readsTokens: true)
        var host = Terms.ofHost
        host.shape = Shape()
        var pair = Pair.serving(host: host, worker: worker)
        // 4 values of 2 bytes and one of 4, all its bits set: a number of something
        var bytes: [UInt8] = []
        for _ in 0..<3 { bytes += [0, 0x3C, 0, 0x3C, 0, 0x3C, 0, 0x3C, 0xFF, 0xFF, 0xFF, 0xFF] }
        let rows = Rows(format: RowFormat(.f16), count: 3, hidden: bytes[...])
        try pair.host.step(
            spans: [Span(session: 0, position: 0, count: 3)], tokens: [5, -1, 7], rows: rows, now: pair.now)
        pair.run()
        guard case .step(let step) = pair.workerEvents.last else { return missed("no STEP: \(pair.workerEvents)") }
        #expect(step.tokens == [5, -1, 7])
        #expect(step.rows == rows)
        bytes[3] = 0x7C
        let bad = Rows(format: RowFormat(.f16), count: 3, hidden: bytes[...])
        try pair.host.step(
            spans: [Span(session: 0, position: 3, count: 3)], tokens: [5, -1, 7], rows: bad, now: pair.now)
        pair.run()
        #expect(pair.brokenAtWorker == .nonFinite)
    }

    @Test func valuesThatAreNotFiniteAreRefused() throws {
        for bits in [UInt16(0x7C00), 0xFC00, 0x7E00, 0x7C01] {
            for place in [0, 1, 7, 8, 15] {
                var pair = Pair.serving()
                var rows = f16Rows(2)
                rows.hidden[2 * place] = UInt8(bits & 0xFF)
                rows.hidden[2 * place + 1] = UInt8(bits >> 8)
                try pair.host.step(spans: [Span(session: 0, position: 0, count: 2)], rows: rows, now: pair.now)
                pair.run()
                #expect(pair.brokenAtWorker == .nonFinite)
                #expect(pair.codeAtHost == .nonFinite)
            }
        }
        #expect(countNonFinite(of: [0x7B, 0xFF].reversed(), .f16) == 0)
        #expect(countNonFinite(of: [0, 0, 0x80, 0x7F, 0, 0, 0x80, 0xFF, 0, 0, 0x7F, 0x7F], .f32) == 2)
        // every pattern of 16 bits, in every lane of a word and behind the last whole one, among neighbours with all bits set
        // but one
        let mask: UInt16 = 0x7C00
        let quiet = ~(mask & ~(mask << 1))
        for bits in UInt16.min...UInt16.max {
            var values = [UInt16](repeating: quiet, count: 6)
            values[Int(bits % 6)] = bits
            let expected = bits & mask == mask ? 1 : 0
            guard values.withUnsafeBytes({ countNonFinite($0, .f16) }) == expected else {
                Issue.record("\(bits)")
                return
            }
        }
    }

    // MARK: time

    @Test func deadlinesAreAbsolute() {
        var drip = Pair()
        let flight = drip.greeted()
        for byte in flight {
            drip.now += 100
            drip.deliver(toWorker: [byte])
            if drip.worker.isClosed { break }
        }
        #expect(drip.brokenAtWorker == .deadline)
        #expect(drip.now == 1_000_000 + Time.preamble)
        #expect(drip.worker.output.isEmpty)

        var mute = Pair(.inquire)
        mute.run()
        #expect(mute.worker.nextWake() == 1_000_000 + Time.opening)
        mute.now += Time.opening - 1
        mute.run()
        #expect(!mute.worker.isClosed)
        mute.now += 1
        mute.pollBoth()
        #expect(mute.brokenAtWorker == .deadline)
        #expect(mute.brokenAtHost == .deadline)
    }

    @Test func silenceEndsServingAndHeartbeatsKeepIt() {
        var pair = Pair.serving()
        for _ in 0..<20 {
            pair.now += Time.heartbeat
            #expect(pair.worker.heartbeatDue(now: pair.now))
            pair.worker.heartbeat(Heartbeat(), now: pair.now)
            pair.host.heartbeat(now: pair.now)
            pair.run()
        }
        #expect(pair.worker.isServing)
        pair.now += Time.silence - 1
        pair.pollBoth()
        #expect(pair.worker.isServing)
        pair.now += 1
        pair.pollBoth()
        #expect(pair.brokenAtWorker == .deadline)
        #expect(pair.brokenAtHost == .deadline)
    }

    @Test func aComputationIsNotSilence() {
        var pair = Pair.serving()
        pair.now += 60_000
        pair.worker.beginWaiting(now: pair.now)
        pair.pollWorker()
        #expect(pair.worker.isServing)
    }

    @Test func theHostWaitsForAWorkerThatLoads() {
        var pair = Pair()
        pair.accepting = false
        pair.run()
        for _ in 0..<100 {
            pair.now += Time.heartbeat
            var beat = Heartbeat()
            beat.state = .loading
            pair.worker.heartbeat(beat, now: pair.now)
            pair.run()
        }
        #expect(!pair.host.isClosed)
        pair.worker.accept(now: pair.now)
        pair.run()
        #expect(pair.worker.isServing)
    }

    // MARK: ends

    @Test func theWorkerSaysWhyItLeaves() {
        for reason in GoodbyeReason.allCases {
            var pair = Pair.serving()
            pair.worker.goodbye(reason, now: pair.now)
            pair.run()
            #expect(pair.hostEnding == .goodbye(reason))
        }
        var report = ErrorReport(code: .tooHot, text: "the phone is too hot")
        report.step = 3
        report.session = 1
        report.block = 17
        report.count = 9
        var pair = Pair.serving()
        pair.worker.fail(report, now: pair.now)
        pair.run()
        #expect(pair.hostEnding == .peerFailed(report))
        #expect(pair.worker.isClosed)
        pair.worker.disconnected()
        #expect(pair.workerEnding == .failed(report))
    }

    @Test func aLostConnectionIsLost() {
        var pair = Pair.serving()
        pair.worker.disconnected()
        pair.host.disconnected()
        pair.pollBoth()
        #expect(pair.workerEnding == .lost)
        #expect(pair.hostEnding == .lost)
    }

    // MARK: pairing and push

    @Test func pairingGivesAKeyThatWorks() throws {
        let code = PairingCode.random()
        var pair = Pair(
            .pair(name: "a desk", software: "test"), key: PairKey(code: code),
            secrets: WorkerSecrets(pairing: PairKey(code: code)))
        pair.run()
        #expect(pair.workerEvents.contains(.pairRequested(name: "a desk", software: "test")))
        let key = PairKey.random()
        pair.worker.grant(key, now: pair.now)
        pair.run()
        guard case .granted(let grant) = pair.hostEvents.dropLast().last else {
            return missed("nothing granted: \(pair.hostEvents)")
        }
        #expect(grant.key == key.bytes)
        #expect(grant.name == "a phone")
        #expect(pair.workerEnding == .paired)
        #expect(pair.hostEnding == .paired)
        var after = Pair(key: key, secrets: WorkerSecrets(keys: [key]))
        after.run()
        #expect(after.worker.isServing)
    }

    @Test func aPushCanGoOnWhereItStopped() {
        let items = [
            PushItem(kind: .directoryManifest, index: 0, size: 10, digest: .unknown),
            PushItem(kind: .packageWeights, index: 0, size: 20, digest: .unknown),
            PushItem(kind: .packageWeights, index: 1, size: 5, digest: .unknown),
        ]
        let offer = PushOffer(
            model: .unknown, slice: .unknown, firstBlock: 11, lastBlock: 16, items: items, name: "a desk")
        var terms = Terms.ofWorker
        terms.features = .push
        var pair = Pair(.push(offer), terms: terms)
        pair.run()
        #expect(pair.workerEvents.last == .pushOffered(offer))
        pair.worker.need([10, 4, 0], now: pair.now)
        pair.run()
        #expect(pair.hostEvents.last == .needs([10, 4, 0]))
        let first = PushData(item: 1, offset: 4, bytes: [UInt8](repeating: 1, count: 16)[...])
        pair.host.pushData(first, now: pair.now)
        pair.run()
        #expect(pair.workerEvents.last == .pushData(first))
        #expect(!pair.worker.pushIsComplete)
        pair.worker.stored(item: 1, bytes: 20, now: pair.now)
        pair.host.pushData(PushData(item: 2, offset: 0, bytes: [1, 2, 3, 4, 5]), now: pair.now)
        pair.run()
        #expect(pair.hostEvents.last == .stored(item: 1, bytes: 20))
        #expect(pair.worker.pushIsComplete)
        let result = PushResult(outcome: .ok, item: nil, text: "")
        pair.worker.pushResult(result, now: pair.now)
        pair.run()
        #expect(pair.hostEnding == .pushed(result))
    }

    @Test(arguments: [(1, 0, 5), (0, 0, 5), (0, 3, 5), (0, 4, 17), (2, 0, 1)])
    func pushedBytesInAnotherOrderAreRefused(item: Int, offset: Int, count: Int) {
        let items = [
            PushItem(kind: .directoryManifest, index: 0, size: 20, digest: .unknown),
            PushItem(kind: .selfTest, index: 0, size: 20, digest: .unknown),
        ]
        let offer = PushOffer(
            model: .unknown, slice: .unknown, firstBlock: 11, lastBlock: 16, items: items, name: "a desk")
        var terms = Terms.ofWorker
        terms.features = .push
        var pair = Pair(.push(offer), terms: terms)
        pair.run()
        pair.worker.need([4, 0], now: pair.now)
        pair.host.pushData(
            PushData(item: UInt16(item), offset: UInt64(offset), bytes: [UInt8](repeating: 1, count: count)[...]),
            now: pair.now)
        pair.run()
        #expect(pair.brokenAtWorker == .pushOrder)
        #expect(pair.codeAtHost == .unexpected)
    }

    @Test func aPushListThatBreaksItsRulesIsRefused() {
        func refusal(_ change: (inout [PushItem]) -> Void) -> RefusalReason? {
            var items = [
                PushItem(kind: .directoryManifest, index: 0, size: 20, digest: .unknown),
                PushItem(kind: .selfTest, index: 0, size: 20, digest: .unknown),
            ]
            change(&items)
            let offer = PushOffer(
                model: .unknown, slice: .unknown, firstBlock: 0, lastBlock: 1, items: items, name: "")
            var terms = Terms.ofWorker
            terms.features = .push
            var pair = Pair(.push(offer), terms: terms)
            pair.run()
            return if case .refusedByPeer(let refusal) = pair.hostEnding { refusal.reason } else { nil }
        }
        #expect(refusal { _ in } == nil)
        #expect(refusal { $0.reverse() } == .pushItems)
        #expect(refusal { $0[1] = $0[0] } == .pushItems)
        #expect(refusal { $0[0].size = 0 } == .pushItems)
        #expect(refusal { $0[0].size = 1 << 40 + 1 } == .pushItems)
    }

    @Test func aWorkerThatTakesNoFilesSaysSo() {
        let offer = PushOffer(
            model: .unknown, slice: .unknown, firstBlock: 0, lastBlock: 1,
            items: [PushItem(kind: .gguf, index: 0, size: 1, digest: .unknown)], name: "")
        var pair = Pair(.push(offer))
        pair.run()
        guard case .refusedByPeer(let refusal) = pair.hostEnding else { return missed("not refused") }
        #expect(refusal.reason == .noPush)
    }
}

private func countNonFinite(of bytes: [UInt8], _ dtype: DType) -> Int {
    bytes.withUnsafeBytes { countNonFinite($0, dtype) }
}

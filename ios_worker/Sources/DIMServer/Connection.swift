// One accepted connection: moves bytes between the socket and the state machine, and rows between the state machine and
// the stage. The protocol's rules are not here.
//
// The thread of the connection reads, computes and answers in turn. While it computes, the server's ticker may send a
// HEARTBEAT and anybody may say GOODBYE, so the state machine and the socket's sending side are under a lock; computing
// is not.
import DIMCrypto
import DIMStage
import DIMWire
import Foundation

final class Connection: @unchecked Sendable {
    private let server: Server
    private let socket: Socket
    private let address: String
    private let lock = NSLock()

    // Under `lock`.
    private var wire: WorkerConnection
    private var computing = false
    private var lastStep: UInt32 = 0
    private var broken = false
    private var bytesReceived: UInt64 = 0
    private var bytesSent: UInt64 = 0

    // Of the connection's thread.
    private var key: KeyID = .none
    private var name = ""
    private var host: String?
    private var stage: (any Stage)?
    private var waiting: [(step: Step, received: UInt64)] = []
    /// HELLO of a host whose ghost still has the worker
    private var replacing: Terms?
    private var pushed: (total: UInt64, sizes: [UInt64], done: UInt64)?

    /// what the terms of this connection were made of
    let offered: StageShape?
    /// in the order of their arrival
    let number: Int
    /// where the peer is: its IPv4 address, or the network of its IPv6 address, of which one machine has all addresses
    let network: String

    init(_ server: Server, _ socket: Socket, number: Int) {
        self.server = server
        self.number = number
        self.socket = socket
        address = socket.address(ofPeer: true)
        network = Socket.network(of: Socket.split(address)?.host ?? address)
        let (terms, shape) = server.terms()
        offered = shape
        wire = WorkerConnection(terms: terms, secrets: server.secrets(), acceptedAt: monotonicMilliseconds())
    }

    // MARK: from other threads

    /// Whether the peer has not shown yet that it knows a key. Not under `lock`, which a send to a peer that takes
    /// nothing holds for long: the accept thread asks this of every connection.
    var isHandshaking: Bool { phase.withLock { $0 == .handshaking } }

    /// Whether everything is said, and only the peer's time to read it is waited for.
    var isEnding: Bool { phase.withLock { $0 == .ending } }

    /// Ends a handshake, or what is left of a connection, to make room for a newer one.
    func letGo() {
        phase.withLock { if $0 != .open { $0 = .letGo } }
        socket.shutDown()
    }

    /// Says GOODBYE, to a peer that takes it within `farewell`; the connection ends either way.
    func leave(_ reason: GoodbyeReason) { end { $0.goodbye(reason, now: monotonicMilliseconds()) } }

    /// Ends the connection because of something that happened beside it, as `leave` does.
    func fail(_ report: ErrorReport) { end { $0.fail(report, now: monotonicMilliseconds()) } }

    private func end(_ say: (inout WorkerConnection) -> Void) {
        socket.endSends(within: Connection.farewell)
        // whoever holds the lock for a send gives it up by then
        guard lock.lock(before: Date(timeIntervalSinceNow: 2 * Double(Connection.farewell) / 1000)) else {
            socket.shutDown()
            return
        }
        say(&wire)
        flush()
        let ended = wire.isClosed
        lock.unlock()
        // whoever waits for bytes wakes up and sees that it is over; what was sent still arrives
        if ended { socket.finishSending() }
    }

    /// How long a goodbye may take. iOS ends an app that holds up its main thread, or takes its time to leave.
    static let farewell: Milliseconds = 500

    func heartbeatWhileComputing() {
        // who holds the lock is sending, and a peer that takes no bytes hears no heartbeat either: the ticker has other
        // connections and clocks to look after
        guard lock.try() else { return }
        defer { lock.unlock() }
        let now = monotonicMilliseconds()
        guard computing, wire.heartbeatDue(now: now), socket.waitWritable(0) else { return }
        wire.heartbeat(beat(.computing), now: now)
        flush()
    }

    private enum Phase { case handshaking, open, ending, letGo }
    private let phase = Locked(Phase.handshaking)

    // MARK: the connection's thread

    func run() {
        // a pool for each turn: a reply of an hour is one run
        while pooled({ turn() }) {}
        pooled { finish() }
    }

    /// Waits for bytes or computes, once; false at the end.
    private func turn() -> Bool {
        handleEvents()
        let (closed, serving, wake) = locked {
            flush()
            return (wire.isClosed || broken, wire.isServing, wire.nextWake())
        }
        if closed { return false }
        if let terms = replacing {
            admit(terms)
            if replacing != nil { Thread.sleep(forTimeInterval: 0.005) }
            return true
        }
        if !waiting.isEmpty {
            // a PING behind the STEPs is answered before them
            if !receive(waiting: false) { compute() }
            return true
        }
        let now = monotonicMilliseconds()
        if serving {
            _ = receive(waiting: true)
            heartbeatIfDue(.idle)
        } else if socket.waitReadable(wake.map { $0 - now } ?? Socket.patience) {
            _ = receive(waiting: false)
        }
        return true
    }

    /// True if bytes came, or the end of them.
    private func receive(waiting: Bool) -> Bool {
        var ended = false
        var count = 0
        // Only this thread receives. The lock is not held while waiting for bytes: the buffer is the thread's own.
        let result = withReceiveBuffer { socket.receive(into: $0, waiting: waiting) }
        switch result {
        case .bytes(let bytes): count = bytes
        case .ended: ended = true
        case .nothing: break
        }
        if ended {
            locked { wire.disconnected() }
            return true
        }
        guard count > 0 else { return false }
        locked { bytesReceived += UInt64(count) }
        var offset = 0
        while offset < count {
            let part = UnsafeRawBufferPointer(rebasing: UnsafeRawBufferPointer(buffer)[offset..<count])
            offset += locked {
                wire.receive(now: monotonicMilliseconds()) { space in
                    let fits = min(space.count, part.count)
                    space.copyMemory(from: UnsafeRawBufferPointer(rebasing: part[..<fits]))
                    return fits
                }
            }
            handleEvents()
        }
        return true
    }

    private let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 16, alignment: 16)

    private func withReceiveBuffer<R>(_ body: (UnsafeMutableRawBufferPointer) -> R) -> R { body(buffer) }

    deinit { buffer.deallocate() }

    private func handleEvents() {
        while let event = locked({ wire.poll(now: monotonicMilliseconds()) }) { handle(event) }
    }

    private func handle(_ event: WorkerEvent) {
        switch event {
        case .handshaken(let key, let connection):
            self.key = key ?? .none
            name = connection
            phase.withLock { if $0 == .handshaking { $0 = .open } }
        case .hello(let terms, _): admit(terms)
        case .pushOffered(let offer): beginPush(offer)
        case .pairRequested(let host, _): grant(host)
        case .step(let step): waiting.append((step, monotonicMicroseconds()))
        case .rewind(let session, let position):
            // in the order of arrival among steps
            computeAll()
            stage?.rewind(session: session, position: position)
            locked { wire.rewound(session: session, to: position) }
        case .endSession(let session):
            computeAll()
            stage?.end(session: session)
            locked { wire.rewound(session: session, to: 0) }
        case .pushData(let data): store(data)
        case .heartbeat: break
        case .closed(let ending): closed(ending)
        }
    }

    private func admit(_ terms: Terms) {
        replacing = nil
        let admission = server.admit(self, key: key, host: terms)
        locked {
            let now = monotonicMilliseconds()
            switch admission {
            case .admitted(let stage):
                stage.reset()
                self.stage = stage
                host = shown(terms.name)
                wire.accept(now: now)
            case .busy(let busy): wire.busy(busy, now: now)
            case .replacing:
                replacing = terms
                if wire.heartbeatDue(now: now) { wire.heartbeat(beat(.loading), now: now) }
            case .refused(let reason, let text): wire.refuse(reason, text, now: now)
            case .failed(let report): wire.fail(report, now: now)
            }
            flush()
        }
        if case .admitted = admission {
            server.configuration.report(
                .connected(host: host ?? "", address: address, connection: name))
        }
    }

    private func grant(_ name: String) {
        do {
            let key = try server.grant(to: name)
            locked {
                if let key {
                    wire.grant(key, now: monotonicMilliseconds())
                } else {
                    wire.fail(
                        ErrorReport(code: .unexpected, text: "the pairing code is no longer valid"),
                        now: monotonicMilliseconds())
                }
            }
            if key != nil { host = shown(name) }
        } catch {
            locked {
                wire.fail(
                    ErrorReport(code: .internal, text: "the key could not be kept: \(error)"),
                    now: monotonicMilliseconds())
            }
        }
    }

    // MARK: steps

    private func computeAll() {
        while !waiting.isEmpty, locked({ !wire.isClosed }) { pooled { compute() } }
    }

    private func compute() {
        let (step, received) = waiting.removeFirst()
        guard let stage else { return }
        let void = locked {
            let void = wire.isVoid(step)
            if void {
                wire.stepFailed(step, nil, now: monotonicMilliseconds())
                flush()
            }
            return void
        }
        if void { return }
        var answer = WorkerConnection.stepDoneBuffer(step)
        locked { computing = true }
        let started = monotonicMicroseconds()
        var failure: StageError?
        if server.configuration.device().temperature == .critical {
            locked {
                computing = false
                wire.fail(
                    ErrorReport(
                        code: .tooHot, text: "\(server.name) is too hot: it stopped to cool down"),
                    now: monotonicMilliseconds())
                flush()
            }
            return
        }
        answer.withUnsafeMutableBytes { whole in
            let rows = UnsafeMutableRawBufferPointer(rebasing: whole.suffix(step.rows.hidden.count))
            do throws(StageError) {
                try stage.evaluate(step, into: rows)
            } catch {
                failure = error
            }
        }
        let took = monotonicMicroseconds() - started
        locked {
            computing = false
            let now = monotonicMilliseconds()
            if let failure {
                let report = failure.report(step: step.id, worker: server.name)
                switch failure {
                // of its sessions only, which hold what they held before it
                case .nonFinite, .overflow: wire.stepFailed(step, report, now: now)
                case .noMemory, .compute: wire.fail(report, now: now)
                }
            } else {
                lastStep = step.id
                wire.stepDone(
                    &answer, for: step, computeMicroseconds: UInt32(clamping: took),
                    waitedMicroseconds: UInt32(clamping: started - received), now: now)
            }
            flush()
            // the time of the computation is not the host's silence
            wire.beginWaiting(now: now)
        }
        server.configuration.report(.step(rows: step.rows.count, microseconds: took))
    }

    private func heartbeatIfDue(_ state: Heartbeat.State) {
        locked {
            let now = monotonicMilliseconds()
            guard wire.heartbeatDue(now: now) else { return }
            wire.heartbeat(beat(state), now: now)
            flush()
        }
    }

    private func beat(_ state: Heartbeat.State) -> Heartbeat {
        let device = server.configuration.device()
        var beat = Heartbeat()
        beat.state = state
        beat.temperature = device.temperature
        beat.battery = device.battery
        beat.memory = device.memory.map { UInt32(clamping: $0 >> 20) }
        beat.lastStep = lastStep
        return beat
    }

    // MARK: push

    /// Work that may take longer than a heartbeat's interval: the ticker sends them meanwhile.
    private func working<R>(_ work: () throws(PushStore.Failure) -> R) throws(PushStore.Failure) -> R {
        locked { computing = true }
        defer {
            locked {
                computing = false
                wire.beginWaiting(now: monotonicMilliseconds())
            }
        }
        return try work()
    }

    private func beginPush(_ offer: PushOffer) {
        guard let store = server.configuration.pushStore else { return }
        if let busy = server.admitPush(self, key: key, offer: offer) {
            locked { wire.busy(busy, now: monotonicMilliseconds()) }
            return
        }
        host = shown(offer.name)
        server.configuration.report(.connected(host: host ?? "", address: address, connection: name))
        do throws(PushStore.Failure) {
            let have = try working { () throws(PushStore.Failure) in try store.begin(offer) }
            pushed = (
                offer.items.reduce(0) { $0 + $1.size }, offer.items.map(\.size), have.reduce(0, +)
            )
            locked { wire.need(have, now: monotonicMilliseconds()) }
            finishPushIfComplete(store)
        } catch {
            pushFailed(error)
        }
    }

    private func store(_ data: PushData) {
        guard let store = server.configuration.pushStore else { return }
        do throws(PushStore.Failure) {
            if let stored = try working({ () throws(PushStore.Failure) in try store.write(data) }) {
                locked {
                    wire.stored(item: Int(data.item), bytes: stored, now: monotonicMilliseconds())
                    flush()
                }
            }
            pushed?.done += UInt64(data.bytes.count)
            if let pushed { server.configuration.report(.pushing(bytes: pushed.done, of: pushed.total)) }
            finishPushIfComplete(store)
        } catch {
            pushFailed(error)
        }
    }

    private func finishPushIfComplete(_ store: PushStore) {
        guard locked({ wire.pushIsComplete && !wire.isClosed }) else { return }
        do throws(PushStore.Failure) {
            let place = try working { () throws(PushStore.Failure) in try store.finish() }
            locked {
                wire.pushResult(PushResult(outcome: .ok, item: nil, text: ""), now: monotonicMilliseconds())
                flush()
            }
            server.configuration.report(.pushed(place))
        } catch {
            pushFailed(error)
        }
    }

    private func pushFailed(_ failure: PushStore.Failure) {
        locked {
            let now = monotonicMilliseconds()
            let begun = wire.isServing
            switch failure {
            case .items(let text) where !begun: wire.refuse(.pushItems, text, now: now)
            case .space(let text) where !begun: wire.refuse(.noSpace, text, now: now)
            case .storing(let text) where !begun: wire.refuse(.noSpace, text, now: now)
            case .items(let text), .space(let text), .storing(let text):
                wire.pushResult(PushResult(outcome: .storingFailed, item: nil, text: text), now: now)
            case .hashDiffers(let item) where begun:
                wire.pushResult(
                    PushResult(outcome: .hashDiffers, item: UInt16(item), text: "the file arrived altered"), now: now)
            case .hashDiffers(let item):
                // found before anything was agreed: the item is gone, the next push sends it again
                wire.fail(
                    ErrorReport(code: .internal, text: "item \(item) was stored wrongly: push again"), now: now)
            }
            flush()
        }
    }

    // MARK: ends

    private func closed(_ ending: Ending) {
        switch ending {
        case .paired: server.configuration.report(.paired(host: host ?? ""))
        case .broken(let error) where host == nil: server.refused(address, error.description)
        case .refused(let reason, let text) where host == nil:
            server.refused(address, "\(reason.name): \(text)")
        default: break
        }
        guard let host else { return }
        let (received, sent) = locked {
            flush()
            return (bytesReceived, bytesSent)
        }
        server.configuration.report(
            .disconnected(host: host, why: sentence(ending), received: received, sent: sent))
    }

    private func finish() {
        handleEvents()
        waiting.removeAll()
        server.configuration.pushStore.map { if pushed != nil { $0.end() } }
        server.release(self)
        let wasLetGo = phase.withLock { phase in
            if phase != .letGo { phase = .ending }
            return phase == .letGo
        }
        if wasLetGo {
            // its place is wanted now
            server.ended(self)
            return
        }
        // let the peer read what was said before the connection goes away: a close with bytes unread would reset it
        socket.finishSending()
        let until = monotonicMilliseconds() + 200
        while monotonicMilliseconds() < until, socket.waitReadable(until - monotonicMilliseconds()) {
            guard case .bytes = withReceiveBuffer({ socket.receive(into: $0, waiting: false) }) else { break }
        }
        server.ended(self)
    }

    private func flush() {
        guard !wire.output.isEmpty else { return }
        if !broken, !socket.send(wire.output) {
            broken = true
            wire.disconnected()
        }
        bytesSent += UInt64(wire.output.count)
        wire.sent()
    }

    private func locked<R>(_ body: () -> R) -> R {
        lock.lock()
        defer { lock.unlock() }
        return body()
    }
}

/// How a connection ended, for a person.
private func sentence(_ ending: Ending) -> String {
    switch ending {
    case .goodbye(.finished), .goodbye(.shuttingDown): "the host is done"
    case .goodbye(.pausing): "the host pauses"
    case .goodbye(.replaced): "the host connected anew"
    case .peerFailed(let report): "the host stopped: \(shown(report.text))"
    case .broken(let error): "closed: \(error)"
    case .refusedByPeer(let refusal): "the host refused: \(shown(refusal.text))"
    case .refused(_, let text): text
    case .busy: "another host is served"
    case .left(.pausing): "paused"
    case .left(.replaced): "the host connected anew"
    case .left: "stopped"
    case .failed(let report): report.text
    case .paired: "paired"
    case .pushed(let result): result.outcome == .ok ? "received" : "not received: \(result.text)"
    case .lost: "the connection was lost"
    }
}

// Listens, admits one host at a time, and lets each connection run on a thread of its own.
//
//     accept thread -> connection thread: bytes <-> WorkerConnection <-> Stage
//     ticker thread:   heartbeats while a connection thread computes; the end of the pairing window
//
// Neither the accept thread nor the ticker ever waits for a peer: what they ask of a connection does not need its lock.
//
// `start` and `stop` may follow each other as often as an app goes to the background and comes back: a suspended app has
// lost every listener and connection, so `start` always makes a new listener.
import DIMCrypto
import DIMStage
import DIMWire
import Foundation

public final class Server: @unchecked Sendable {
    let configuration: ServerConfiguration
    /// random, per process
    private let instance = UInt64.random(in: .min ... .max)
    private let lock = NSLock()

    // Everything below is touched under `lock` only.
    private var stage = StageState.none
    private var listener: Listener?
    private var keys = KnownKeys()
    private var calledName: String
    private var accepted = 0
    private var connections: [ObjectIdentifier: Connection] = [:]
    private var serving: Serving?
    private var window: PairingWindow?
    private var lastLog: [String: Milliseconds] = [:]
    private var ticking = false

    /// The host that has the worker.
    private struct Serving {
        let connection: Connection
        let key: KeyID
        let instance: UInt64
        let host: String
        let since: Milliseconds
    }

    /// What was last read of the key store.
    private struct KnownKeys {
        var list = KeyList([])
        /// of the store, when that was read; nil: to be read anew
        var stamp: UInt64?
        /// something could not be read, and is not tried again before then
        var again: Milliseconds?
    }

    private struct PairingWindow {
        let code: PairingCode
        let until: Milliseconds
    }

    /// Whether a connection may have the worker.
    enum Admission {
        case admitted(any Stage)
        case busy(Busy)
        /// a dead connection of the same host has it: it was told to end, ask again
        case replacing
        case refused(RefusalReason, String)
        case failed(ErrorReport)
    }

    public init(_ configuration: ServerConfiguration) {
        self.configuration = configuration
        calledName = configuration.name
    }

    // MARK: for the program around it

    /// Listens. Returns the address, with the real port.
    @discardableResult
    public func start() throws(SocketError) -> String {
        // two live listeners do not fit one port
        locked { take(&listener) }?.stop()
        let fresh = try Listener(configuration.listen, calls: configuration.calls)
        let tick: Bool = locked {
            listener = fresh
            // keys may have come or gone while nobody could ask for them
            (keys.stamp, keys.again) = (nil, nil)
            defer { ticking = true }
            return !ticking
        }
        Thread.start("dim accept") { self.accept(fresh) }
        if tick { Thread.start("dim tick") { self.tick() } }
        configuration.report(.listening(fresh.address))
        return fresh.address
    }

    /// Stops listening and says GOODBYE to whoever is connected. When it returns the port is free and every goodbye is
    /// said or given up: it takes about a second at most, with hosts that take no bytes, and is not for a main thread.
    public func stop(_ reason: GoodbyeReason) {
        locked { take(&listener) }?.stop()
        // after it: nobody is added any more
        let open = locked { Array(connections.values) }
        let leaving = DispatchGroup()
        for connection in open {
            leaving.enter()
            Thread.start("dim leave") {
                connection.leave(reason)
                leaving.leave()
            }
        }
        leaving.wait()
    }

    /// Ends the connection that is being served, saying why: memory runs out, say. The worker goes on listening. Returns
    /// at once.
    public func drop(_ report: ErrorReport) {
        guard let connection = locked({ serving?.connection }) else { return }
        Thread.start("dim leave") { connection.fail(report) }
    }

    /// How hosts that connect from now on call this worker.
    public func rename(_ name: String) { locked { calledName = name } }

    /// What hosts call this worker.
    var name: String { locked { calledName } }

    /// The keys of the store are read anew before the next handshake: one was taken away.
    public func keysChanged() { locked { (keys.stamp, keys.again) = (nil, nil) } }

    public var isListening: Bool { locked { listener != nil } }

    /// What is served from now on. A host that is being served by another stage is told to come back. Returns at once.
    public func serve(_ stage: StageState) {
        let old = locked {
            self.stage = stage
            return serving?.connection
        }
        if let old { Thread.start("dim leave") { old.leave(.shuttingDown) } }
    }

    /// Opens the pairing window: a new code, for 5 minutes and one use. Wrong codes are not counted: it has 100 bits, and a
    /// count would let whoever sends a few take the code from the person who is typing it.
    public func openPairing() -> PairingCode {
        let code = PairingCode.random()
        locked {
            window = PairingWindow(code: code, until: monotonicMilliseconds() + Time.pairing)
        }
        return code
    }

    public func closePairing() {
        let was = locked {
            defer { window = nil }
            return window != nil
        }
        if was { configuration.report(.pairingClosed) }
    }

    // MARK: for connections

    /// What the worker holds and can, as of now, and the shape that it follows from.
    func terms() -> (Terms, StageShape?) {
        var terms = Terms()
        let (shape, name) = locked { (stage.shape, calledName) }
        terms.instance = instance
        terms.software = configuration.software
        terms.name = name
        terms.features = configuration.pushStore == nil ? [] : .push
        guard let shape else { return (terms, nil) }
        terms.dtypes = shape.dtypes
        terms.role = .middle
        terms.shape = .hidden(shape.nEmbd)
        terms.takeBack = .max
        terms.machine = shape.machine
        terms.modelBlocks = UInt32(shape.modelBlocks)
        terms.firstBlock = UInt32(shape.firstBlock)
        terms.lastBlock = UInt32(shape.lastBlock)
        terms.nCtx = UInt32(min(shape.hostContext ?? shape.nCtx, shape.nCtx))
        terms.maxRows = UInt32(shape.maxRows)
        terms.maxSessions = UInt32(shape.maxSessions)
        terms.maxInFlight = configuration.maxInFlight
        terms.model = shape.model
        terms.slice = shape.slice
        terms.parameters = shape.parameters
        terms.arch = shape.arch
        return (terms, shape)
    }

    func secrets() -> WorkerSecrets {
        let pairing = locked { openWindow().map { PairKey(code: $0.code) } }
        return WorkerSecrets(keys: knownKeys().list.keys, pairing: pairing)
    }

    /// The store's keys, and whether that is known to be all there is to know; otherwise what was last read. It is asked
    /// only when its stamp has changed, or a second after it could not be read: anybody may connect, and a keychain is slow.
    private func knownKeys() -> (list: KeyList, isCurrent: Bool) {
        let stamp = configuration.keys.stamp
        let now = monotonicMilliseconds()
        let known = locked { keys }
        if let again = known.again, now < again { return (known.list, false) }
        if known.again == nil, known.stamp == stamp { return (known.list, true) }
        let read = try? configuration.keys.list()
        return locked {
            if let read { keys.list = read }
            keys.stamp = stamp
            keys.again = read?.unread.isEmpty == true ? nil : now + 1000
            return (keys.list, read != nil)
        }
    }

    /// Whether the host of `terms` may have the worker, for steps.
    func admit(_ connection: Connection, key: KeyID, host: Terms) -> Admission {
        locked {
            switch stage {
            case .none: return .refused(.noSlice, "the worker has no slice: give it one")
            case .loading(_, let text): return .refused(.notReady, text)
            case .failed(_, let text):
                return .failed(ErrorReport(code: .selfTest, text: text))
            case .ready(let ready):
                guard ready.shape == connection.offered else {
                    return .refused(.notReady, "the worker has just been given another slice")
                }
                if let taken = taken(key, host.instance) { return taken }
                if configuration.device().temperature == .critical {
                    return .failed(
                        ErrorReport(code: .tooHot, text: "\(calledName) is too hot: let it cool down"))
                }
                serving = Serving(
                    connection: connection, key: key, instance: host.instance, host: host.name,
                    since: monotonicMilliseconds())
                return .admitted(ready)
            }
        }
    }

    /// Whether a host may have the worker, for a push; nil = yes.
    func admitPush(_ connection: Connection, key: KeyID, offer: PushOffer) -> Busy? {
        locked {
            if case .busy(let busy)? = taken(key, nil) { return busy }
            serving = Serving(
                connection: connection, key: key, instance: 0, host: offer.name, since: monotonicMilliseconds())
            return nil
        }
    }

    /// nil if nobody has the worker.
    private func taken(_ key: KeyID, _ instance: UInt64?) -> Admission? {
        guard let serving else { return nil }
        if let instance, serving.key == key, serving.instance == instance {
            // the same process with a new connection: the old one is a ghost
            let ghost = serving.connection
            Thread.start("dim replace") { ghost.leave(.replaced) }
            return .replacing
        }
        let since = UInt64(max(0, monotonicMilliseconds() - serving.since))
        return .busy(Busy(since: since, host: serving.host))
    }

    /// The connection ended, or gives the worker back.
    func release(_ connection: Connection) {
        locked { if serving?.connection === connection { serving = nil } }
    }

    func ended(_ connection: Connection) {
        release(connection)
        locked { _ = connections.removeValue(forKey: ObjectIdentifier(connection)) }
    }

    /// A key for a host that knew the code: kept before it is given, and only then is the code used up. nil if the window
    /// closed meanwhile.
    func grant(to host: String) throws -> PairKey? {
        // of two hosts that know the code one gets a key
        granting.lock()
        defer { granting.unlock() }
        guard let open = locked({ openWindow() }) else { return nil }
        let key = PairKey.random()
        try configuration.keys.add(key, name: host)
        keysChanged()
        // another code may have been opened while the key was written
        let was = locked {
            guard window?.code == open.code else { return false }
            window = nil
            return true
        }
        if was { configuration.report(.pairingClosed) }
        return key
    }

    private let granting = NSLock()

    /// One line per address and minute.
    func refused(_ address: String, _ why: String) {
        let host = Socket.split(address)?.host ?? address
        let now = monotonicMilliseconds()
        let say = locked {
            if lastLog.count > 1000 { lastLog.removeAll() }
            if let last = lastLog[host], now - last < 60_000 { return false }
            lastLog[host] = now
            return true
        }
        if say { configuration.report(.refused(address: address, why: why)) }
    }

    // MARK: threads

    private func accept(_ listener: Listener) {
        listener.run { accepted in
            makeRoom()
            let number: Int? = locked {
                guard self.listener === listener, connections.count < Server.mostConnections else { return nil }
                self.accepted += 1
                return self.accepted
            }
            guard let number else { return }
            let connection = Connection(self, accepted, number: number)
            locked { connections[ObjectIdentifier(connection)] = connection }
            Thread.start("dim connection") { connection.run() }
        }
        let lost = locked {
            guard self.listener === listener else { return false }
            self.listener = nil
            return true
        }
        if lost { configuration.report(.listenerLost) }
    }

    private var crowd = Crowd()

    /// Where too many handshakes are under way, the oldest goes of the network that has the most, those counted that were
    /// let go lately: whoever connects and says nothing keeps nobody out, and pushes out nobody but its own.
    private func makeRoom() {
        let all = locked { Array(connections.values) }
        let ending = all.filter(\.isEnding)
        // strangers that were told that they may not come in do not fill the room while they read it
        if ending.count >= Limit.handshakes { ending.min { $0.number < $1.number }?.letGo() }
        let handshakes = all.filter(\.isHandshaking).sorted { $0.number < $1.number }
        guard handshakes.count >= Limit.handshakes, let place = crowd.leaves(handshakes.map(\.network)) else { return }
        handshakes[place].letGo()
        crowd.add(handshakes[place].network)
        // one that is let go ends as soon as its thread runs
        for _ in 0..<100 where locked({ connections.count >= Server.mostConnections }) { usleep(1000) }
    }

    /// handshakes, hosts that have shown a key, and connections that are about to be gone
    private static let mostConnections = 4 * Limit.handshakes

    /// Ends the connection of a host whose key was taken away: it is a stranger now. A key that cannot be read for a moment
    /// is still there.
    private func endIfRevoked() {
        guard let serving = locked({ serving }) else { return }
        let (list, isCurrent) = knownKeys()
        guard isCurrent, list.lacks(serving.key) else { return }
        let text = "this host's key was taken away at the worker; pair again"
        Thread.start("dim leave") { serving.connection.fail(ErrorReport(code: .revoked, text: text)) }
    }

    private func tick() {
        for count in 1... {
            Thread.sleep(forTimeInterval: 0.1)
            pooled {
                if count % 10 == 0 { endIfRevoked() }
                let (computing, expired) = locked {
                    let had = window != nil
                    return (serving?.connection, had && openWindow() == nil)
                }
                computing?.heartbeatWhileComputing()
                if expired { configuration.report(.pairingClosed) }
            }
        }
    }

    private func take<T>(_ value: inout T?) -> T? {
        defer { value = nil }
        return value
    }

    private func openWindow() -> PairingWindow? {
        if let open = window, monotonicMilliseconds() >= open.until { window = nil }
        return window
    }

    private func locked<R>(_ body: () -> R) -> R {
        lock.lock()
        defer { lock.unlock() }
        return body()
    }
}

extension Thread {
    /// Runs `body` on a new thread of 1 MiB stack.
    static func start(_ name: String, _ body: @escaping @Sendable () -> Void) {
        let thread = Thread(block: body)
        thread.name = name
        thread.stackSize = 1 << 20
        thread.qualityOfService = .userInteractive
        thread.start()
    }
}

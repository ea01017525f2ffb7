// What the screen shows and what the buttons do: the state of the worker, on the main actor. The server reports from its
// own threads; steps are counted there and shown twice a second.
import DIMCoreML
import DIMServer
import DIMStage
import DIMWire
import Foundation
import Observation
import UIKit

@MainActor
@Observable
final class Worker {
    /// One package, one line.
    struct PackageLine: Identifiable {
        let id: Int
        let blocks: String
        var state = "waiting"
        var isReady = false
    }

    private(set) var name = UIDevice.current.name
    private(set) var addresses: [String] = []
    private(set) var slice: String?
    private(set) var packages: [PackageLine] = []
    private(set) var figures: [UnitFigure] = []
    private(set) var host: String?
    private(set) var steps = StepMeter.Reading()
    private(set) var device = DeviceState()
    private(set) var receiving: Double?
    private(set) var pairing: PairingOffer?
    /// what is wrong and what to do about it; one at a time
    private(set) var problem: String?

    private let meter = StepMeter()
    private let monitor = DeviceMonitor()
    private let store: PushStore
    private let server: Server
    private let bonjour = Bonjour()
    private var port = ""
    private var isLoading = false
    private var ticker: Task<Void, Never>?

    /// A code to be shown, and what its QR code holds.
    struct PairingOffer: Equatable {
        let code: String
        let link: String
        let until: Date
    }

    init() {
        store = PushStore(Places.received)
        var configuration = ServerConfiguration(keys: KeychainKeys())
        configuration.listen = "[::]:7878"
        configuration.name = UIDevice.current.name
        configuration.software = "DIM for iPhone 0.1.0"
        configuration.pushStore = store
        let (stream, events) = AsyncStream<ServerEvent>.makeStream()
        let meter = meter
        configuration.report = { event in
            if case .step(let rows, let microseconds) = event {
                meter.add(rows: rows, microseconds: microseconds)
            } else {
                events.yield(event)
            }
        }
        let monitor = monitor
        configuration.device = { monitor.state }
        server = Server(configuration)
        Task { for await event in stream { handle(event) } }
        let server = server
        _ = NotificationCenter.default.addObserver(
            forName: UIApplication.didReceiveMemoryWarningNotification, object: nil, queue: nil
        ) { _ in
            // better an end with a reason than one by the system without
            server.drop(ErrorReport(code: .noMemory, text: "the phone is short of memory: give it fewer blocks"))
        }
    }

    // MARK: foreground and background

    func resume() {
        UIApplication.shared.isIdleTimerDisabled = true
        monitor.start()
        if !server.isListening { listen() }
        // packages may have been copied here meanwhile
        if packages.isEmpty { Task { await load() } }
        ticker?.cancel()
        ticker = Task {
            while !Task.isCancelled {
                steps = meter.reading()
                device = monitor.state
                try? await Task.sleep(for: .milliseconds(500))
            }
        }
    }

    func pause() {
        UIApplication.shared.isIdleTimerDisabled = false
        ticker?.cancel()
        bonjour.stop()
        server.stop(.pausing)
        host = nil
        pairing = nil
    }

    private func listen() {
        do {
            let address = try server.start()
            port = address.split(separator: ":").last.map { String($0) } ?? "7878"
            addresses = localAddresses().map { "\($0):\(port)" }
            if addresses.isEmpty { problem = "No network: connect the iPhone to the Wi-Fi of the host." }
            bonjour.start(name: name, port: UInt16(port) ?? 7878) { [weak self] in
                Task { @MainActor in
                    self?.problem = """
                        Hosts cannot find this iPhone by itself: allow Local Network for DIM in Settings, Privacy & \
                        Security. The address above works all the same.
                        """
                }
            }
        } catch {
            problem = "The worker cannot listen (\(error)). Close other apps that serve port 7878, then reopen DIM."
        }
    }

    // MARK: packages

    /// Finds the newest packages and loads them.
    func load() async {
        guard !isLoading else { return }
        guard let directory = Places.newest(store) else {
            server.serve(.none)
            problem = """
                No model yet. Pair with a host and send it from there with dim-host push; or copy the folder \
                STEM.middle-A..B.coreml into DIM with Finder or the Files app, then reopen DIM.
                """
            return
        }
        isLoading = true
        defer { isLoading = false }
        problem = nil
        do throws(ManifestError) {
            let manifest = try Manifest.read(directory)
            show(manifest)
            let shape = StageShape(manifest)
            server.serve(.loading(shape, "\(name) is testing its packages"))
            await load(manifest, shape, directory)
        } catch {
            server.serve(.none)
            problem = "\(error.description)."
        }
    }

    private func load(_ manifest: Manifest, _ shape: StageShape, _ directory: URL) async {
        let loader = CoreMLLoader(manifest: manifest, directory: directory)
        do {
            try await Task.detached(priority: .userInitiated) {
                try manifest.verify(directory)
            }.value
            let (stream, progress) = AsyncStream<LoadProgress>.makeStream()
            let watcher = Task { for await step in stream { self.show(step) } }
            let loaded = try await Task.detached(priority: .userInitiated) {
                defer { progress.finish() }
                return try await loader.load { progress.yield($0) }
            }.value
            await watcher.value
            figures = loaded.figures
            var parameters = PackagedStage.Parameters(manifest)
            parameters.prefillFrom = loaded.prefillFrom
            server.serve(
                .ready(PackagedStage(shape: shape, parameters: parameters, packages: loaded.packages)))
            for index in packages.indices {
                packages[index].state = "ready on the \(loaded.unit.title)"
                packages[index].isReady = true
            }
        } catch {
            let text = (error as? ManifestError)?.description ?? error.localizedDescription
            server.serve(.failed(shape, text))
            problem = "These packages cannot be used: \(text)."
        }
    }

    private func show(_ manifest: Manifest) {
        slice = "\(shown(manifest.model.name)), blocks \(manifest.slice.firstBlock)..\(manifest.slice.lastBlock)"
        packages = manifest.packages.enumerated().map { index, package in
            PackageLine(id: index, blocks: "blocks \(package.firstBlock)..\(package.lastBlock)")
        }
        figures = []
    }

    private func show(_ progress: LoadProgress) {
        switch progress {
        case .compiling(let index, _): packages[index].state = "compiling"
        case .loading(let unit, let index, _): packages[index].state = "loading on the \(unit.title)"
        case .testing(let unit):
            for index in packages.indices { packages[index].state = "self-test on the \(unit.title)" }
        case .tested(_, let figure): figures = figures.filter { $0.unit != figure.unit } + [figure]
        case .ready: break
        }
    }

    // MARK: pairing

    func showPairingCode() {
        let code = server.openPairing()
        let address = addresses.first ?? ""
        pairing = PairingOffer(
            code: code.shown, link: "dim:pair?code=\(code.shown)&address=\(address)",
            until: .now + Double(Time.pairing) / 1000)
    }

    func hidePairingCode() {
        server.closePairing()
        pairing = nil
    }

    // MARK: what the server reports

    private func handle(_ event: ServerEvent) {
        switch event {
        case .listening, .refused, .step: break
        case .listenerLost:
            problem = "The system closed the listener. Reopen DIM."
        case .connected(let name, _, _):
            host = name
            problem = nil
            meter.reset()
        case .disconnected(_, let why, _, _):
            host = nil
            receiving = nil
            if why.hasPrefix("block") || why.contains("too hot") || why.contains("not finite") { problem = why + "." }
        case .paired: pairing = nil
        case .pairingClosed: pairing = nil
        case .pushing(let bytes, let total): receiving = total > 0 ? Double(bytes) / Double(total) : nil
        case .pushed:
            receiving = nil
            Task { await load() }
        }
    }
}

/// Tokens and times of steps, counted on the server's threads.
final class StepMeter: @unchecked Sendable {
    struct Reading: Equatable {
        var tokens = 0
        var tokensPerSecond = 0.0
        var millisecondsPerStep = 0.0
    }

    private let lock = NSLock()
    private var tokens = 0
    /// of the last steps: when they ended, rows, how long they took
    private var recent: [(time: Milliseconds, rows: Int, microseconds: UInt64)] = []

    func add(rows: Int, microseconds: UInt64) {
        lock.withLock {
            tokens += rows
            recent.append((monotonicMilliseconds(), rows, microseconds))
            if recent.count > 64 { recent.removeFirst() }
        }
    }

    func reset() {
        lock.withLock {
            tokens = 0
            recent = []
        }
    }

    func reading() -> Reading {
        lock.withLock {
            let now = monotonicMilliseconds()
            recent.removeAll { now - $0.time > 5000 }
            var reading = Reading()
            reading.tokens = tokens
            guard let first = recent.first, let last = recent.last else { return reading }
            let span = Double(max(last.time - first.time, 1)) / 1000
            let rows = recent.dropFirst().reduce(0) { $0 + $1.rows }
            reading.tokensPerSecond = rows > 0 ? Double(rows) / span : 0
            let total = recent.reduce(UInt64(0)) { $0 + $1.microseconds }
            reading.millisecondsPerStep = Double(total) / Double(recent.count) / 1000
            return reading
        }
    }
}

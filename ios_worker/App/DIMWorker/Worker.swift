// Puts the parts together: the server, the loader, the device, and the screen that shows them. Everything on the main
// actor; the server and the loader report from threads of their own.
import DIMCoreML
import DIMPhone
import DIMServer
import DIMStage
import DIMWire
import Foundation
import UIKit

@MainActor
final class Worker {
    let screen: Screen

    private let monitor = DeviceMonitor()
    private let store: PushStore
    private let server: Server
    private let control: ServerSwitch
    private let background = UIKitBackgroundTime()
    private let network = NetworkWatch()
    private let bonjour = Bonjour()
    private let mark = TrialMark()
    private var lifecycle = Lifecycle()
    private var ticker: Task<Void, Never>?
    private lazy var announcer = Announcer(
        start: { [weak self] in self?.register($0) }, stop: { [weak self] in self?.bonjour.stop() })
    private lazy var loading = SliceLoading<CoreMLLoader.Wish>(
        newest: { SliceDirectory.newest(in: [Places.received, Places.documents])?.url },
        load: { [weak self] place, wish in await self?.load(place, wish) ?? false })

    private static let nameKey = "name"

    init() {
        let name = DeviceName.best(
            chosen: UserDefaults.standard.string(forKey: Worker.nameKey), system: UIDevice.current.name,
            machine: DeviceName.machine())
        let meter = StepMeter()
        screen = Screen(name: name, meter: meter)
        store = PushStore(Places.received)
        var configuration = ServerConfiguration(keys: SecretKeys(KeychainStore()))
        configuration.listen = "[::]:7878"
        configuration.name = name
        configuration.software = "DIM for iPhone 0.1.0"
        configuration.pushStore = store
        let (stream, events) = AsyncStream<ServerEvent>.makeStream()
        configuration.report = { event in
            if case .step(let rows, let microseconds) = event {
                meter.add(rows: rows, microseconds: microseconds)
            } else {
                events.yield(event)
            }
        }
        let monitor = monitor
        configuration.device = { monitor.state }
        let server = Server(configuration)
        self.server = server
        let screen = screen
        control = ServerSwitch(server) { error in Task { @MainActor in screen.cannotListen(error) } }
        Task { for await event in stream { handle(event) } }
        _ = NotificationCenter.default.addObserver(
            forName: UIApplication.didReceiveMemoryWarningNotification, object: nil, queue: nil
        ) { _ in
            // better an end with a reason than one by the system without
            server.drop(ErrorReport(code: .noMemory, text: "the phone is short of memory: give it fewer blocks"))
        }
    }

    // MARK: foreground and background

    func enter(_ phase: AppPhase) {
        switch lifecycle.enter(phase) {
        case .resume: resume()
        case .pause: pause()
        case nil: break
        }
    }

    private func resume() {
        UIApplication.shared.isIdleTimerDisabled = true
        mark.setForeground(true)
        monitor.start()
        control.listen()
        network.start { [weak self] in self?.refreshAddresses() }
        // packages may have been copied here meanwhile
        loading.look(.init())
        screen.show(stored: store.slices())
        ticker?.cancel()
        ticker = Task {
            while !Task.isCancelled {
                screen.tick(device: monitor.state)
                try? await Task.sleep(for: .milliseconds(500))
            }
        }
    }

    private func pause() {
        UIApplication.shared.isIdleTimerDisabled = false
        mark.setForeground(false)
        ticker?.cancel()
        network.stop()
        announcer.announce(nil)
        control.pause(background)
        screen.paused()
    }

    private func refreshAddresses() {
        let found = reachable(InterfaceAddress.all())
        screen.show(addresses: found)
        guard let port = screen.port else { return }
        announcer.announce(Announcement(name: screen.name, port: port, addresses: found))
    }

    private func register(_ announcement: Announcement) {
        bonjour.start(name: announcement.name, port: announcement.port) { [weak self] in
            Task { @MainActor in self?.screen.cannotAnnounce() }
        }
    }

    private func handle(_ event: ServerEvent) {
        switch screen.handle(event) {
        case .load: loading.want(.init())
        case .listen: control.listen()
        case .announce: refreshAddresses()
        case nil: break
        }
    }

    // MARK: packages

    /// Loads and serves what lies at `place`; true if it is served.
    private func load(_ place: URL?, _ wish: CoreMLLoader.Wish) async -> Bool {
        guard let place else {
            server.serve(.none)
            screen.noModel()
            return false
        }
        do {
            let manifest = try Manifest.read(place)
            screen.show(manifest)
            let shape = StageShape(manifest)
            server.serve(.loading(shape, "\(screen.name) is testing its packages"))
            do {
                try await serve(manifest, shape, place, wish)
                return true
            } catch {
                server.serve(.failed(shape, explanation(of: error)))
                screen.failed(error)
            }
        } catch {
            server.serve(.none)
            screen.failed(error)
        }
        return false
    }

    private func serve(
        _ manifest: Manifest, _ shape: StageShape, _ place: URL, _ wish: CoreMLLoader.Wish
    ) async throws {
        let loader = CoreMLLoader(manifest: manifest, directory: place, mark: mark)
        screen.showChecking()
        try await Task.detached(priority: .userInitiated) {
            excludeFromBackup(place)
            try manifest.verify(place)
        }.value
        let (stream, progress) = AsyncStream<LoadProgress>.makeStream()
        let watcher = Task { for await step in stream { screen.show(step) } }
        let loaded: LoadedPackages
        do {
            loaded = try await Task.detached(priority: .userInitiated) {
                defer { progress.finish() }
                return try await loader.load(wish) { progress.yield($0) }
            }.value
        } catch {
            await watcher.value
            throw error
        }
        await watcher.value
        var parameters = PackagedStage.Parameters(manifest)
        parameters.prefillFrom = loaded.prefillFrom
        server.serve(.ready(PackagedStage(shape: shape, parameters: parameters, packages: loaded.packages)))
        screen.ready(loaded.unit, loaded.figures)
        // it works: older ones only take room
        store.dropOlder(than: place)
        screen.show(stored: store.slices())
    }

    // MARK: buttons

    /// Once more, with what ended the app last time.
    func tryAgain() { loading.want(.init(forgiving: true)) }

    /// Every unit, and the fastest of them.
    func compareUnits() { loading.want(.init(comparing: true)) }

    func delete(_ slice: SliceDirectory) {
        try? store.remove(slice.url)
        screen.show(stored: store.slices())
        loading.look(.init())
    }

    func rename(_ name: String) {
        UserDefaults.standard.set(name, forKey: Worker.nameKey)
        screen.name = DeviceName.best(chosen: name, system: UIDevice.current.name, machine: DeviceName.machine())
        server.rename(screen.name)
        refreshAddresses()
    }

    func showPairingCode() {
        screen.show(server.openPairing().shown, until: .now + Double(Time.pairing) / 1000)
    }

    func hidePairingCode() {
        server.closePairing()
        screen.hidePairing()
    }
}

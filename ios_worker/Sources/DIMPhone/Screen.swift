// What the screen shows, and how the server's reports and the loader's progress change it. No view and no device is in
// here. Each part is a property of its own: a view is drawn anew when a property that it reads changes, and only then.
import DIMCoreML
import DIMServer
import DIMStage
import DIMWire
import Foundation
import Observation

@MainActor
@Observable
public final class Screen {
    /// One package, one line.
    public struct PackageLine: Identifiable, Equatable, Sendable {
        public let id: Int
        public let blocks: String
        public var state = "waiting"
        public var isReady = false
    }

    /// Something is wrong: what, and what to do about it.
    public struct Problem: Equatable, Sendable {
        public var text: String
        /// another load may help
        public var canRetry = false

        public init(_ text: String, canRetry: Bool = false) {
            self.text = text
            self.canRetry = canRetry
        }
    }

    /// A code to be typed on a host.
    public struct Pairing: Equatable, Sendable {
        public let code: String
        public let until: Date

        /// What to run on the host, whole: its second word is the code. nil without an address.
        public func command(_ address: String?) -> String? { address.map { "dim-host pair \($0) \(code)" } }
    }

    /// What the app does because of a report.
    public enum Effect: Equatable, Sendable {
        /// packages have come
        case load
        /// the listener is gone
        case listen
        /// a real port is known
        case announce
    }

    public var name: String
    /// "ADDR:PORT", the best first
    public private(set) var addresses: [String] = []
    public private(set) var slice: String?
    public private(set) var packages: [PackageLine] = []
    public private(set) var figures: [UnitFigure] = []
    public private(set) var host: String?
    /// nil: nothing is being received; else the part that is there
    public private(set) var receiving: Double?
    public private(set) var pairing: Pairing?
    /// the host that was paired last
    public private(set) var paired: String?
    public private(set) var stored: [SliceDirectory] = []
    /// one at a time
    public private(set) var problem: Problem?
    /// twice a second, while something changes
    public private(set) var steps = StepMeter.Reading()
    public private(set) var device = DeviceState()
    public private(set) var port: UInt16?

    private let meter: StepMeter
    private var lostListeners = 0

    public init(name: String, meter: StepMeter) {
        self.name = name
        self.meter = meter
    }

    // MARK: what changes by itself

    /// Reads the meter and the device. Values that are what they were redraw nothing.
    public func tick(device: DeviceState) {
        let reading = meter.reading()
        if reading != steps { steps = reading }
        if device != self.device { self.device = device }
    }

    /// The network is another one, or the same.
    public func show(addresses found: [String]) {
        let shown = port.map { port in found.map { "\($0):\(port)" } } ?? []
        if shown != addresses { addresses = shown }
        let none = "No network: connect this device to the Wi-Fi of the host."
        if found.isEmpty, problem == nil { problem = Problem(none) }
        if !found.isEmpty, problem?.text == none { problem = nil }
    }

    // MARK: what the server reports

    /// - Returns: what to do about it
    public func handle(_ event: ServerEvent) -> Effect? {
        switch event {
        case .refused, .step: break
        case .listening(let address):
            port = address.split(separator: ":").last.flatMap { UInt16($0) }
            return .announce
        case .listenerLost:
            lostListeners += 1
            // the system takes a listener now and then; one that it takes again and again is another matter
            if lostListeners <= 3 { return .listen }
            problem = Problem("The system closed the listener. Reopen DIM.")
        case .connected(let name, _, _):
            host = name
            lostListeners = 0
            // what is wrong with packages is wrong still
            if problem?.canRetry == false { problem = nil }
            meter.reset()
        case .disconnected(_, let why, _, _):
            host = nil
            receiving = nil
            if why.hasPrefix("block") || why.contains("too hot") || why.contains("not finite") {
                problem = Problem(why + ".")
            }
        case .paired(let host):
            pairing = nil
            paired = host
        case .pairingClosed: pairing = nil
        case .pushing(let bytes, let total): receiving = total > 0 ? Double(bytes) / Double(total) : nil
        case .pushed:
            receiving = nil
            return .load
        }
        return nil
    }

    /// The app went to the background: nobody is connected, no code is open.
    public func paused() {
        host = nil
        pairing = nil
        receiving = nil
        lostListeners = 0
    }

    public func cannotListen(_ error: SocketError) {
        problem = Problem(
            "The worker cannot listen (\(error)). Close other apps that serve its port, then reopen DIM.")
    }

    public func cannotAnnounce() {
        problem = Problem(
            """
            Hosts cannot find this device by itself: allow Local Network for DIM in Settings, Privacy & Security. \
            The address works all the same.
            """)
    }

    // MARK: pairing

    public func show(_ code: String, until: Date) {
        paired = nil
        pairing = Pairing(code: code, until: until)
    }

    public func hidePairing() { pairing = nil }

    // MARK: packages

    public func show(stored: [SliceDirectory]) { self.stored = stored }

    public func noModel() {
        slice = nil
        packages = []
        figures = []
        problem = Problem(
            """
            No model yet. Pair with a host and send it from there with dim-host push; or copy the folder \
            STEM.middle-A..B.coreml into DIM with Finder or the Files app.
            """)
    }

    public func show(_ manifest: Manifest) {
        problem = nil
        slice = "\(shown(manifest.model.name)), blocks \(manifest.slice.firstBlock)..\(manifest.slice.lastBlock)"
        packages = manifest.packages.enumerated().map { index, package in
            PackageLine(id: index, blocks: "blocks \(package.firstBlock)..\(package.lastBlock)")
        }
        figures = []
    }

    public func showChecking() { for index in packages.indices { packages[index].state = "checking" } }

    public func show(_ progress: LoadProgress) {
        switch progress {
        case .compiling(let index, _): set(index, "compiling")
        case .loading(let unit, let index, _): set(index, "loading on the \(unit.title)")
        case .testing(let unit): for index in packages.indices { set(index, "self-test on the \(unit.title)") }
        case .tested(_, let figure): figures = figures.filter { $0.unit != figure.unit } + [figure]
        case .ready: break
        }
    }

    private func set(_ index: Int, _ state: String) {
        if packages.indices.contains(index) { packages[index].state = state }
    }

    /// The packages are served by `unit`.
    public func ready(_ unit: ComputeUnit, _ figures: [UnitFigure]) {
        self.figures = figures
        let elsewhere = figures.first { $0.unit == unit.rawValue }?.isElsewhere == true
        for index in packages.indices {
            packages[index].state = elsewhere ? "ready, not on the \(unit.title)" : "ready on the \(unit.title)"
            packages[index].isReady = true
        }
    }

    /// They cannot be served, for now.
    public func failed(_ error: any Error) {
        for index in packages.indices {
            packages[index].state = "not served"
            packages[index].isReady = false
        }
        problem = Problem("These packages cannot be used: \(explanation(of: error)).", canRetry: true)
    }
}

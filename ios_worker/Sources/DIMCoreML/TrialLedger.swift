// What is known of the compute units from this start and earlier ones, on disk: how each did, and which attempt was under
// way when the app was ended. The system ends an app that takes too much memory without a word; whoever then forgets what
// it was doing does it again at the next start, for ever.
import DIMCrypto
import Foundation

/// How one unit did.
public struct UnitFigure: Codable, Equatable, Sendable {
    public var unit: String
    /// nil if it could not be run; then `problem` says why
    public var decodeMs: Double?
    public var prefillMs: Double?
    public var medianError: Double?
    public var passes: Bool
    public var problem: String?
    /// what loading it added to the process's memory: bytes; nil if the system does not say
    public var footprint: UInt64?
    /// it passes, but the weights lie in the process's memory: it is not the Neural Engine that computes
    public var isElsewhere: Bool?
    /// where the system says that it puts the operations, for a person; asked for in comparisons only
    public var plan: String?

    public init(unit: String, passes: Bool) {
        self.unit = unit
        self.passes = passes
    }

    /// In one line, for a screen.
    public var sentence: String {
        guard passes else { return problem ?? "failed" }
        var text = String(format: "%.1f ms per token, error %.2g", decodeMs ?? 0, medianError ?? 0)
        if isElsewhere == true {
            text += "; not on the Neural Engine: \((footprint ?? 0) >> 20) MiB in the app's memory"
        }
        if let plan { text += "; \(plan)" }
        return text
    }
}

/// One way to run the packages that is tried as a whole.
public struct Attempt: Codable, Hashable, Sendable {
    public var unit: String
    public var withPrefill: Bool
}

/// The mark of the attempt under way, on disk while the app is in the foreground: only there is the end of the app the
/// attempt's fault. A suspended app is ended for any reason.
public final class TrialMark: Sendable {
    private struct State {
        var file: URL?
        var attempt: Attempt?
        var isInForeground = true
    }

    private let state = Locked(State())

    public init() {}

    public func setForeground(_ isInForeground: Bool) {
        state.withLock { state in
            state.isInForeground = isInForeground
            TrialMark.write(state)
        }
    }

    func begin(_ attempt: Attempt, _ file: URL) {
        state.withLock { state in
            state.file = file
            state.attempt = attempt
            TrialMark.write(state)
        }
    }

    func end() {
        state.withLock { state in
            state.attempt = nil
            TrialMark.write(state)
        }
    }

    private static func write(_ state: State) {
        guard let file = state.file else { return }
        if let attempt = state.attempt, state.isInForeground, let data = try? JSONEncoder().encode(attempt) {
            try? data.write(to: file, options: .atomic)
        } else {
            try? FileManager.default.removeItem(at: file)
        }
    }
}

/// The figures of one set of packages on one system.
public final class TrialLedger: Sendable {
    private struct Content: Codable {
        var system: String
        var figures: [UnitFigure] = []
        /// attempts that ended the app
        var fatal: Set<Attempt> = []
    }

    private let file: URL
    private let trying: URL
    private let mark: TrialMark
    private let content: Locked<Content>

    /// Reads what is there. An attempt that is still marked as under way ended the app.
    /// - Parameters:
    ///   - system: another one than last time: everything is tried anew
    ///   - mark: of this run of the app
    public init(_ directory: URL, system: String, mark: TrialMark) {
        file = directory.appendingPathComponent("trials.json")
        trying = directory.appendingPathComponent("trying.json")
        self.mark = mark
        var content = Content(system: system)
        if let known = TrialLedger.read(Content.self, file), known.system == system { content = known }
        let ended = TrialLedger.read(Attempt.self, trying)
        if let ended { content.fatal.insert(ended) }
        self.content = Locked(content)
        if ended != nil {
            save()
            try? FileManager.default.removeItem(at: trying)
        }
    }

    /// Of all units that were tried so far.
    public var figures: [UnitFigure] { content.withLock { $0.figures } }

    /// The fastest of those that passed.
    var best: UnitFigure? {
        figures.filter(\.passes).min { $0.decodeMs ?? .infinity < $1.decodeMs ?? .infinity }
    }

    /// Notes how a unit did, at once: the next one may end the app.
    func keep(_ figure: UnitFigure) {
        content.withLock { $0.figures = $0.figures.filter { $0.unit != figure.unit } + [figure] }
        save()
    }

    func endedTheApp(_ attempt: Attempt) -> Bool { content.withLock { $0.fatal.contains(attempt) } }

    func begin(_ attempt: Attempt) { mark.begin(attempt, trying) }
    func end() { mark.end() }

    /// What ended the app may be tried again: a person says so.
    public func forgive() {
        content.withLock { $0.fatal = [] }
        save()
    }

    private func save() {
        // only a hint for the next start: without it, it takes longer
        if let data = try? JSONEncoder().encode(content.withLock { $0 }) { try? data.write(to: file, options: .atomic) }
    }

    private static func read<T: Decodable>(_ type: T.Type, _ url: URL) -> T? {
        (try? Data(contentsOf: url)).flatMap { try? JSONDecoder().decode(type, from: $0) }
    }
}

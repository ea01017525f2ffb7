// Which compute unit serves the packages:
//
//     the unit that was best last time, else the Neural Engine, the GPU, the CPU in this order
//     of each: enough memory? not the one that ended the app? load, run the self-test, note error, times and memory
//     the first that passes is taken; a comparison tries them all and takes the fastest
//
// A unit that cannot load or compile a package is a figure like any other, not a failure. If none passes, nothing is
// served. What Core ML does of it is behind `UnitTrier`, so that all this is tested where there is no Core ML.
import DIMStage
import Foundation

/// What the trials ask of Core ML.
protocol UnitTrier {
    /// Loaded packages; letting go of them frees their memory.
    associatedtype Packages

    func load(_ unit: ComputeUnit, withPrefill: Bool) async throws -> Packages
    func test(_ packages: Packages, withPrefill: Bool) throws -> SelfTestResult
    /// Where the system puts the operations, in words.
    func plan(_ unit: ComputeUnit) async -> String?
}

/// The memory of a device and what the packages are, as far as the trials need it.
struct TrialMemory {
    /// of all packages: bytes
    var weights: UInt64
    /// of the largest package
    var largest: UInt64
    /// of one session's caches
    var states: UInt64
    /// what is left; nil without a limit
    var headroom: () -> UInt64? = { Headroom.bytes() }
    var footprint: () -> UInt64? = { Headroom.footprint() }

    /// Whether the system ends an app that takes too much: a phone.
    var isLimited: Bool { headroom() != nil }
}

/// Where loading is, for a screen.
public enum LoadProgress: Equatable, Sendable, CustomStringConvertible {
    case compiling(package: Int, of: Int)
    case loading(ComputeUnit, package: Int, of: Int)
    case testing(ComputeUnit)
    case tested(ComputeUnit, UnitFigure)
    case ready(ComputeUnit)

    public var description: String {
        switch self {
        case .compiling(let package, let count): "compiling package \(package + 1) of \(count)"
        case .loading(let unit, let package, let count):
            "loading package \(package + 1) of \(count) on the \(unit.title)"
        case .testing(let unit): "self-test on the \(unit.title)"
        case .tested(let unit, let figure): "\(unit.title): \(figure.sentence)"
        case .ready(let unit): "ready on the \(unit.title)"
        }
    }
}

struct UnitTrials<Trier: UnitTrier> {
    let trier: Trier
    let ledger: TrialLedger
    let memory: TrialMemory
    let report: (LoadProgress) -> Void

    struct Chosen {
        let packages: Trier.Packages
        let unit: ComputeUnit
        let figure: UnitFigure
        let withPrefill: Bool
    }

    /// - Parameters:
    ///   - only: that unit and no other
    ///   - comparing: tries every unit and takes the fastest
    func choose(only: ComputeUnit? = nil, comparing: Bool = false) async throws -> Chosen {
        let best = comparing ? nil : ledger.best.flatMap { ComputeUnit(rawValue: $0.unit) }
        let order = only.map { [$0] } ?? ([best].compactMap { $0 } + [.ane, .gpu, .cpu].filter { $0 != best })
        var tried: [UnitFigure] = []
        for unit in order {
            // those of a unit before go first: two sets do not fit a phone
            if let chosen = await attempt(unit, &tried, planned: comparing), !comparing { return ready(chosen) }
        }
        let fastest = tried.filter(\.passes).min { $0.decodeMs ?? .infinity < $1.decodeMs ?? .infinity }
        if comparing, let unit = fastest.flatMap({ ComputeUnit(rawValue: $0.unit) }) {
            if let chosen = await attempt(unit, &tried, planned: false) { return ready(chosen) }
        }
        let each = tried.map { "\($0.unit): \($0.problem ?? "too inexact")" }.joined(separator: "; ")
        throw ManifestError("no compute unit passes the self-test (\(each)): these packages are not served")
    }

    private func ready(_ chosen: Chosen) -> Chosen {
        report(.ready(chosen.unit))
        return chosen
    }

    /// Tries a unit in each way that it can be, and notes how it did before anything else is tried.
    private func attempt(_ unit: ComputeUnit, _ tried: inout [UnitFigure], planned: Bool) async -> Chosen? {
        var figure = UnitFigure(unit: unit.rawValue, passes: false)
        var loaded: (packages: Trier.Packages, withPrefill: Bool)?
        // a unit that refuses `prefill` may still do `decode`. On a phone's GPU and CPU `prefill` would hold the weights
        // a second time
        for withPrefill in memory.isLimited && unit != .ane ? [false] : [true, false] {
            figure = UnitFigure(unit: unit.rawValue, passes: false)
            guard let packages = await run(unit, withPrefill, &figure) else { continue }
            // what is not on the Neural Engine is as good as on the GPU: it is not held twice on a phone
            if figure.isElsewhere == true, withPrefill, memory.isLimited { continue }
            loaded = (packages, withPrefill)
            break
        }
        if planned, loaded != nil {
            figure.plan = await trier.plan(unit)
        } else {
            figure.plan = ledger.figures.first { $0.unit == figure.unit }?.plan
        }
        ledger.keep(figure)
        tried = tried.filter { $0.unit != figure.unit } + [figure]
        report(.tested(unit, figure))
        return loaded.map { Chosen(packages: $0.packages, unit: unit, figure: figure, withPrefill: $0.withPrefill) }
    }

    private func run(_ unit: ComputeUnit, _ withPrefill: Bool, _ figure: inout UnitFigure) async -> Trier.Packages? {
        let attempt = Attempt(unit: unit.rawValue, withPrefill: withPrefill)
        guard !ledger.endedTheApp(attempt) else {
            figure.problem = "the system ended the app here last time: not tried again"
            return nil
        }
        let needed = Headroom.needed(
            unit, weights: memory.weights, largest: memory.largest, states: memory.states, withPrefill: withPrefill)
        if let left = memory.headroom(), left < needed {
            figure.problem = "needs \(needed >> 20) MiB of memory, \(left >> 20) MiB are free"
            return nil
        }
        ledger.begin(attempt)
        defer { ledger.end() }
        let before = memory.footprint()
        do {
            let packages = try await trier.load(unit, withPrefill: withPrefill)
            report(.testing(unit))
            let outcome = try trier.test(packages, withPrefill: withPrefill)
            figure.decodeMs = outcome.decodeMs
            figure.prefillMs = withPrefill ? outcome.prefillMs : nil
            figure.medianError = outcome.medianError
            figure.passes = outcome.passes
            figure.problem = outcome.passes ? nil : outcome.sentence
            if let before, let after = memory.footprint() {
                let grown = after > before ? after - before : 0
                figure.footprint = grown
                // the system does not say that it preferred another unit; the weights do
                if unit == .ane { figure.isElsewhere = grown > memory.weights / 4 }
            }
            return outcome.passes ? packages : nil
        } catch {
            figure.problem = explanation(of: error)
            return nil
        }
    }
}

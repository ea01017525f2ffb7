// Which unit is taken, what is remembered when the app is ended in the middle, and what memory allows: with a stand-in for
// Core ML that refuses, ends and falls back as a phone's does.
import DIMCrypto
import DIMStage
import Foundation
import Testing

@testable import DIMCoreML

/// What the stand-in does with an attempt.
private enum Behaviour {
    case passes(ms: Double)
    case wrong
    case refused
    /// the system ends the app while it loads: it never comes back
    case ends
}

/// One loaded set; alive as long as somebody has it.
private final class LoadedSet {
    private let live: Locked<Int>
    init(_ live: Locked<Int>) {
        self.live = live
        live.withLock { $0 += 1 }
    }
    deinit { live.withLock { $0 -= 1 } }
}

private final class StandIn: UnitTrier, @unchecked Sendable {
    var behaviour: [Attempt: Behaviour] = [:]
    let attempts = Locked<[Attempt]>([])
    let live = Locked(0)
    let mostLive = Locked(0)
    /// bytes that loading adds to the process
    var grows: [ComputeUnit: UInt64] = [:]
    let footprint = Locked<UInt64>(100 << 20)
    private let current = Locked<Behaviour?>(nil)

    func load(_ unit: ComputeUnit, withPrefill: Bool) async throws -> LoadedSet {
        let attempt = Attempt(unit: unit.rawValue, withPrefill: withPrefill)
        attempts.withLock { $0.append(attempt) }
        let now = behaviour[attempt] ?? .passes(ms: 10)
        current.withLock { $0 = now }
        if case .refused = now { throw NSError(domain: "com.apple.CoreML", code: 0) }
        if case .ends = now { try await Task.sleep(for: .seconds(100_000)) }
        footprint.withLock { $0 += grows[unit] ?? 0 }
        let set = LoadedSet(live)
        mostLive.withLock { $0 = max($0, live.withLock { $0 }) }
        return set
    }

    func test(_ packages: LoadedSet, withPrefill: Bool) throws -> SelfTestResult {
        var result = SelfTestResult()
        switch current.withLock({ $0 }) {
        case .passes(let ms):
            result.decodeMs = ms
            result.prefillMs = 4 * ms
        default: result.medianError = 0.5
        }
        return result
    }

    func plan(_ unit: ComputeUnit) async -> String? { "planned: 9 operations \(unit.rawValue)" }
}

@Suite struct TrialTests {
    private func place() throws -> URL {
        let url = FileManager.default.temporaryDirectory.appendingPathComponent("dim-trials-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
        return url
    }

    private func trials(
        _ standIn: StandIn, _ place: URL, left: UInt64? = 4 << 30, mark: TrialMark = TrialMark(),
        system: String = "18.0"
    ) -> UnitTrials<StandIn> {
        let memory = TrialMemory(
            weights: 1 << 30, largest: 400 << 20, states: 10 << 20, headroom: { left },
            footprint: { standIn.footprint.withLock { $0 } })
        return UnitTrials(
            trier: standIn, ledger: TrialLedger(place, system: system, mark: mark), memory: memory, report: { _ in })
    }

    private let ane = Attempt(unit: "ane", withPrefill: true)
    private let aneDecode = Attempt(unit: "ane", withPrefill: false)
    private let gpu = Attempt(unit: "gpu", withPrefill: false)
    private let cpu = Attempt(unit: "cpu", withPrefill: false)

    @Test func theFirstUnitThatPassesIsTakenAndNoOtherLoaded() async throws {
        let (standIn, place) = (StandIn(), try place())
        let chosen = try await trials(standIn, place).choose()
        #expect(chosen.unit == .ane && chosen.withPrefill)
        #expect(standIn.attempts.withLock { $0 } == [ane])
        // and again at the next start
        _ = try await trials(standIn, place).choose()
        #expect(standIn.attempts.withLock { $0 } == [ane, ane])
    }

    @Test func anAttemptThatEndedTheAppIsNotMadeAgain() async throws {
        let (standIn, place) = (StandIn(), try place())
        standIn.behaviour = [ane: .ends, aneDecode: .ends, gpu: .ends]
        // each start gets one attempt further, and never to one that ended the app
        for wanted in [[ane], [aneDecode], [gpu]] {
            standIn.attempts.withLock { $0 = [] }
            let start = Task { [trials = trials(standIn, place)] in _ = try await trials.choose() }
            while standIn.attempts.withLock({ $0.count }) < wanted.count { try await Task.sleep(for: .milliseconds(1)) }
            #expect(standIn.attempts.withLock { $0 } == wanted)
            // the app is ended: nothing of it runs any more, what it wrote stays
            #expect(FileManager.default.fileExists(atPath: place.appendingPathComponent("trying.json").path))
            let copy = try self.place()
            try FileManager.default.removeItem(at: copy)
            try FileManager.default.copyItem(at: place, to: copy)
            start.cancel()
            _ = await start.result
            try FileManager.default.removeItem(at: place)
            try FileManager.default.copyItem(at: copy, to: place)
        }
        standIn.attempts.withLock { $0 = [] }
        let chosen = try await trials(standIn, place).choose()
        #expect(chosen.unit == .cpu)
        #expect(standIn.attempts.withLock { $0 } == [cpu])
        let ledger = TrialLedger(place, system: "18.0", mark: TrialMark())
        #expect(ledger.figures.first { $0.unit == "gpu" }?.problem?.contains("ended the app") == true)

        // a person may want it tried again; another system is another matter altogether
        ledger.forgive()
        #expect(!TrialLedger(place, system: "18.0", mark: TrialMark()).endedTheApp(ane))
        #expect(TrialLedger(place, system: "18.1", mark: TrialMark()).figures.isEmpty)
    }

    @Test func figuresAreKeptBeforeTheNextUnitIsTried() async throws {
        let (standIn, place) = (StandIn(), try place())
        standIn.behaviour = [gpu: .ends]
        // comparing: the ANE passes, then the GPU ends the app
        let start = Task { [trials = trials(standIn, place)] in _ = try await trials.choose(comparing: true) }
        while standIn.attempts.withLock({ !$0.contains(gpu) }) { try await Task.sleep(for: .milliseconds(1)) }
        let seen = TrialLedger(place, system: "18.0", mark: TrialMark())
        #expect(seen.best?.unit == "ane")
        #expect(seen.endedTheApp(gpu))
        start.cancel()
        _ = await start.result
    }

    @Test func theEndInTheBackgroundIsNotTheAttemptsFault() async throws {
        let (standIn, place) = (StandIn(), try place())
        standIn.behaviour = [ane: .ends]
        let mark = TrialMark()
        let start = Task { [trials = trials(standIn, place, mark: mark)] in _ = try await trials.choose() }
        while standIn.attempts.withLock({ $0.isEmpty }) { try await Task.sleep(for: .milliseconds(1)) }
        let trying = place.appendingPathComponent("trying.json").path
        mark.setForeground(false)
        #expect(!FileManager.default.fileExists(atPath: trying))
        // it comes back, and goes on with what it was doing
        mark.setForeground(true)
        #expect(FileManager.default.fileExists(atPath: trying))
        start.cancel()
        _ = await start.result
        // with the attempt over there is nothing to mark
        mark.setForeground(false)
        mark.setForeground(true)
        #expect(!FileManager.default.fileExists(atPath: trying))
    }

    @Test func aUnitThatRefusesOrIsWrongIsAFigureAndTheNextIsTried() async throws {
        let (standIn, place) = (StandIn(), try place())
        standIn.behaviour = [ane: .refused, aneDecode: .wrong, gpu: .passes(ms: 30)]
        let chosen = try await trials(standIn, place).choose()
        #expect(chosen.unit == .gpu && !chosen.withPrefill)
        #expect(standIn.attempts.withLock { $0 } == [ane, aneDecode, gpu])
        #expect(standIn.mostLive.withLock { $0 } == 1)
        // the one that works is first at the next start
        standIn.attempts.withLock { $0 = [] }
        _ = try await trials(standIn, place).choose()
        #expect(standIn.attempts.withLock { $0 } == [gpu])
    }

    @Test func aComparisonTriesAllAndTakesTheFastest() async throws {
        let (standIn, place) = (StandIn(), try place())
        standIn.behaviour = [ane: .passes(ms: 20), gpu: .passes(ms: 5), cpu: .passes(ms: 50)]
        let chosen = try await trials(standIn, place).choose(comparing: true)
        #expect(chosen.unit == .gpu)
        #expect(standIn.attempts.withLock { $0 } == [ane, gpu, cpu, gpu])
        // never two sets at once
        #expect(standIn.mostLive.withLock { $0 } == 1)
        #expect(standIn.live.withLock { $0 } == 1)
        #expect(chosen.figure.plan == "planned: 9 operations gpu")
    }

    @Test func whereNothingIsLimitedEveryUnitHasItsPrefill() async throws {
        let (standIn, place) = (StandIn(), try place())
        standIn.behaviour = [ane: .refused, aneDecode: .refused]
        let chosen = try await trials(standIn, place, left: nil).choose()
        #expect(chosen.unit == .gpu && chosen.withPrefill)
    }

    @Test func memoryIsCountedAsEachUnitHoldsIt() async throws {
        let gigabyte: UInt64 = 1 << 30
        func needed(_ unit: ComputeUnit, _ withPrefill: Bool) -> UInt64 {
            Headroom.needed(
                unit, weights: 3 * gigabyte, largest: gigabyte, states: 10 << 20, withPrefill: withPrefill)
        }
        // while it loads, the Neural Engine's compiler holds a package once and most of it again
        #expect(needed(.ane, true) > gigabyte * 3 / 2 && needed(.ane, true) < 2 * gigabyte)
        for unit in [ComputeUnit.gpu, .cpu] {
            #expect(needed(unit, true) >= 6 * gigabyte)
            #expect(needed(unit, false) >= 3 * gigabyte)
        }
        let (standIn, place) = (StandIn(), try place())
        // 1 GiB of weights: enough for the Neural Engine, not for the others
        standIn.behaviour = [ane: .refused, aneDecode: .refused]
        await #expect(throws: ManifestError.self) {
            try await trials(standIn, place, left: 900 << 20).choose()
        }
        #expect(standIn.attempts.withLock { $0 } == [ane, aneDecode])
    }

    @Test func noLimitIsNotNoMemory() {
        // the simulator, an iPad app on a Mac: 0 is "no such limit"
        #expect(Headroom.meaning(of: 0) == nil)
        #expect(Headroom.meaning(of: -1) == nil)
        #expect(Headroom.meaning(of: 5) == 5)
        #expect(Headroom.bytes() == nil)
        #expect(Headroom.limit() == nil)
    }

    @Test func weightsInTheAppsMemoryAreNotOnTheNeuralEngine() async throws {
        let (standIn, place) = (StandIn(), try place())
        // it passes, it does not throw, and it is not where it was asked to be
        standIn.grows = [.ane: 700 << 20]
        let chosen = try await trials(standIn, place).choose()
        #expect(chosen.unit == .ane && chosen.figure.isElsewhere == true && !chosen.withPrefill)
        #expect(standIn.attempts.withLock { $0 } == [ane, aneDecode])
        #expect(chosen.figure.sentence.contains("not on the Neural Engine: 700 MiB"))

        let (right, other) = (StandIn(), try self.place())
        right.grows = [.ane: 60 << 20]
        let there = try await trials(right, other).choose()
        #expect(there.figure.isElsewhere == false && there.withPrefill)
        #expect(!there.figure.sentence.contains("not on"))
        #expect(there.figure.footprint == 60 << 20)
    }
}

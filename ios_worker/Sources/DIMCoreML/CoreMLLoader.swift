// From a directory of packages to a chain that may be served:
//
//     compile each package, keep the result in Application Support
//     on each compute unit: enough memory? load, run the self-test, note error and times
//     take the fastest that passes; note the figures, so that the next start tries that unit first
//
// A unit that cannot load or compile a package is a figure like any other, not a failure. If none passes, nothing is
// served.
#if canImport(CoreML)
    import CoreML
    import DIMCrypto
    import DIMStage
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
            case .tested(let unit, let figure):
                figure.passes
                    ? "\(unit.title): \(String(format: "%.1f", figure.decodeMs ?? 0)) ms per token"
                    : "\(unit.title): \(figure.problem ?? "failed")"
            case .ready(let unit): "ready on the \(unit.title)"
            }
        }
    }

    /// The packages of a directory, loaded and tested.
    public struct LoadedPackages: @unchecked Sendable {
        // handed over once, to the stage that then owns them
        public let packages: [any Package]
        public let unit: ComputeUnit
        public let figures: [UnitFigure]
        /// `PackagedStage.Parameters.prefillFrom`
        public let prefillFrom: Int
    }

    public struct CoreMLLoader: Sendable {
        private let manifest: Manifest
        private let directory: URL
        private let cache: URL

        /// - Parameter cache: where compiled packages and figures are kept; Application Support by default
        public init(manifest: Manifest, directory: URL, cache: URL? = nil) {
            self.manifest = manifest
            self.directory = directory
            let support =
                cache
                ?? FileManager.default.urls(for: .applicationSupportDirectory, in: .userDomainMask)[0]
                .appendingPathComponent("dim")
            // other files, or another system: compile and test anew
            let system = ProcessInfo.processInfo.operatingSystemVersionString
            let identity = manifest.packages.flatMap { $0.files.map(\.sha256) } + [system]
            let key = hex(SystemPrimitives.sha256(Array(identity.joined().utf8)).prefix(8))
            self.cache = support.appendingPathComponent("compiled-\(key)")
        }

        /// - Parameters:
        ///   - only: that unit and no other
        ///   - report: called as loading goes on
        public func load(
            only: ComputeUnit? = nil, report: @Sendable (LoadProgress) -> Void
        ) async throws -> LoadedPackages {
            guard let test = try SelfTest(manifest, directory: directory) else {
                throw ManifestError(
                    "the packages have no self-test vectors and are not served untested: "
                        + "make them with a dim-split that has llama.cpp in it")
            }
            let compiled = try await compile(report)
            let known = figures()
            // the unit that was best last time, and the others only if it fails now
            let best = known.filter(\.passes).min { $0.decodeMs ?? .infinity < $1.decodeMs ?? .infinity }
            let first = only ?? best.flatMap { ComputeUnit(rawValue: $0.unit) }
            if let first {
                let (figure, packages) = await tryUnit(first, compiled, test, report)
                if let packages {
                    report(.ready(first))
                    return loaded(packages, first, known.isEmpty ? [figure] : known, figure)
                }
                if only != nil { throw failure([figure]) }
            }
            var tried: [UnitFigure] = []
            for unit in [ComputeUnit.ane, .gpu, .cpu] {
                // loaded models go before the next are loaded: two sets do not fit a phone
                let (figure, _) = await tryUnit(unit, compiled, test, report)
                tried.append(figure)
            }
            keep(tried)
            let winner = tried.filter(\.passes).min { $0.decodeMs ?? .infinity < $1.decodeMs ?? .infinity }
            guard let winner, let unit = ComputeUnit(rawValue: winner.unit) else { throw failure(tried) }
            let (figure, packages) = await tryUnit(unit, compiled, test, report)
            guard let packages else { throw failure([figure]) }
            report(.ready(unit))
            return loaded(packages, unit, tried, figure)
        }

        /// Figures of the last start, best known units first; empty if there was none.
        public func figures() -> [UnitFigure] {
            let data = try? Data(contentsOf: cache.appendingPathComponent("figures.json"))
            return data.flatMap { try? JSONDecoder().decode([UnitFigure].self, from: $0) } ?? []
        }

        private func keep(_ figures: [UnitFigure]) {
            // only a hint for the next start: without it, it takes longer
            if let data = try? JSONEncoder().encode(figures) {
                try? data.write(to: cache.appendingPathComponent("figures.json"), options: .atomic)
            }
        }

        private func loaded(
            _ packages: [CoreMLPackage], _ unit: ComputeUnit, _ figures: [UnitFigure], _ now: UnitFigure
        ) -> LoadedPackages {
            var from = Int.max
            if let prefill = now.prefillMs, prefill > 0, let decode = now.decodeMs, decode > 0 {
                from = min(max(2, Int((prefill / decode).rounded(.up))), manifest.nPrefill)
            }
            return LoadedPackages(packages: packages, unit: unit, figures: figures, prefillFrom: from)
        }

        private func failure(_ figures: [UnitFigure]) -> ManifestError {
            let each = figures.map { "\($0.unit): \($0.problem ?? "too inexact")" }.joined(separator: "; ")
            return ManifestError("no compute unit passes the self-test (\(each)): these packages are not served")
        }

        // MARK: compiling

        private func compile(_ report: (LoadProgress) -> Void) async throws -> [URL] {
            try FileManager.default.createDirectory(at: cache, withIntermediateDirectories: true)
            dropOtherCaches()
            var compiled: [URL] = []
            for index in manifest.packages.indices {
                let target = cache.appendingPathComponent("\(index).mlmodelc")
                if !FileManager.default.fileExists(atPath: target.path) {
                    report(.compiling(package: index, of: manifest.packages.count))
                    let package = directory.appendingPathComponent(Manifest.packageName(index))
                    let temporary = try await MLModel.compileModel(at: package)
                    // under its final name it is whole
                    try FileManager.default.moveItem(at: temporary, to: target)
                }
                compiled.append(target)
            }
            return compiled
        }

        /// Compiled packages of other slices are as large as the packages themselves.
        private func dropOtherCaches() {
            let parent = cache.deletingLastPathComponent()
            for name in (try? FileManager.default.contentsOfDirectory(atPath: parent.path)) ?? []
            where name.hasPrefix("compiled-") && name != cache.lastPathComponent {
                try? FileManager.default.removeItem(at: parent.appendingPathComponent(name))
            }
        }

        // MARK: one unit

        private func tryUnit(
            _ unit: ComputeUnit, _ compiled: [URL], _ test: SelfTest, _ report: (LoadProgress) -> Void
        ) async -> (UnitFigure, [CoreMLPackage]?) {
            var figure = UnitFigure(unit: unit.rawValue, passes: false)
            let problem = memoryProblem(unit)
            var result: [CoreMLPackage]?
            if let problem {
                figure.problem = problem
            } else {
                // a unit that refuses `prefill` may still do `decode`
                for withPrefill in [true, false] {
                    do {
                        let packages = try await loadAll(unit, compiled, withPrefill, report)
                        report(.testing(unit))
                        let outcome = try test.run(packages, withPrefill: withPrefill) {
                            Double(DispatchTime.now().uptimeNanoseconds) / 1e9
                        }
                        figure.decodeMs = outcome.decodeMs
                        figure.prefillMs = withPrefill ? outcome.prefillMs : nil
                        figure.medianError = outcome.medianError
                        figure.passes = outcome.passes
                        figure.problem = outcome.passes ? nil : outcome.sentence
                        if outcome.passes { result = packages }
                    } catch {
                        figure.problem = "\(error)"
                    }
                    if result != nil { break }
                }
            }
            report(.tested(unit, figure))
            return (figure, result)
        }

        private func loadAll(
            _ unit: ComputeUnit, _ compiled: [URL], _ withPrefill: Bool, _ report: (LoadProgress) -> Void
        ) async throws -> [CoreMLPackage] {
            var packages: [CoreMLPackage] = []
            for (index, url) in compiled.enumerated() {
                report(.loading(unit, package: index, of: compiled.count))
                packages.append(
                    try await CoreMLPackage.load(url, manifest, index: index, unit: unit, withPrefill: withPrefill))
            }
            return packages
        }

        private func memoryProblem(_ unit: ComputeUnit) -> String? {
            let weights = manifest.packages.flatMap(\.files).reduce(UInt64(0)) { $0 + $1.bytes }
            let states = manifest.packages.reduce(UInt64(0)) { $0 + UInt64($1.stateBytes) }
            let needed = Headroom.needed(unit, weights: weights, states: states)
            guard let there = Headroom.bytes(), there < needed else { return nil }
            return "needs \(needed >> 20) MiB of memory, \(there >> 20) MiB are free"
        }
    }
#endif

// From a directory of packages to a chain that may be served: compiled (CompiledCache), tried on the compute units
// (UnitTrials), with what is known of earlier starts (TrialLedger). Here is only what needs Core ML itself.
#if canImport(CoreML)
    import CoreML
    import DIMCrypto
    import DIMStage
    import Foundation

    /// The packages of a directory, loaded and tested.
    public struct LoadedPackages: @unchecked Sendable {
        // handed over once, to the stage that then owns them
        public let packages: [any Package]
        public let unit: ComputeUnit
        /// of that unit, as of now
        public let figure: UnitFigure
        /// of all units that were tried, now and earlier
        public let figures: [UnitFigure]
        /// `PackagedStage.Parameters.prefillFrom`
        public let prefillFrom: Int
    }

    public struct CoreMLLoader: Sendable {
        private let manifest: Manifest
        private let directory: URL
        private let support: URL
        private let mark: TrialMark

        /// - Parameters:
        ///   - cache: where compiled packages and figures are kept; Application Support by default
        ///   - mark: told when the app goes to the background
        public init(manifest: Manifest, directory: URL, cache: URL? = nil, mark: TrialMark = TrialMark()) {
            self.manifest = manifest
            self.directory = directory
            self.mark = mark
            support =
                cache
                ?? FileManager.default.urls(for: .applicationSupportDirectory, in: .userDomainMask)[0]
                .appendingPathComponent("dim")
        }

        /// How a load is to go.
        public struct Wish: Equatable, Sendable {
            /// that unit and no other
            public var only: ComputeUnit?
            /// all units, and the fastest of them
            public var comparing = false
            /// what ended the app is tried again
            public var forgiving = false

            public init(only: ComputeUnit? = nil, comparing: Bool = false, forgiving: Bool = false) {
                self.only = only
                self.comparing = comparing
                self.forgiving = forgiving
            }
        }

        /// - Parameter report: called as loading goes on
        public func load(
            _ wish: Wish = Wish(), report: @escaping @Sendable (LoadProgress) -> Void
        ) async throws -> LoadedPackages {
            guard let test = try SelfTest(manifest, directory: directory) else {
                throw ManifestError(
                    "the packages have no self-test vectors and are not served untested: "
                        + "make them with a dim-split that has llama.cpp in it")
            }
            let cache = CompiledCache(manifest, in: support)
            let count = manifest.packages.count
            let compiled = try await cache.packages(
                of: directory, compile: { try await MLModel.compileModel(at: $0) },
                report: { report(.compiling(package: $0, of: count)) })
            let system = ProcessInfo.processInfo.operatingSystemVersionString
            let ledger = TrialLedger(cache.directory, system: system, mark: mark)
            if wish.forgiving { ledger.forgive() }
            let sizes = manifest.packages.map { $0.files.reduce(UInt64(0)) { $0 + $1.bytes } }
            let memory = TrialMemory(
                weights: sizes.reduce(0, +), largest: sizes.max() ?? 0,
                states: manifest.packages.reduce(UInt64(0)) { $0 + UInt64($1.stateBytes) })
            let trials = UnitTrials(
                trier: Trier(manifest: manifest, compiled: compiled, selfTest: test, report: report), ledger: ledger,
                memory: memory, report: report)
            // without a limit nothing is ended for trying: a Mac takes the fastest, once it is known which that is
            let comparing = wish.comparing || (!memory.isLimited && ledger.best == nil && wish.only == nil)
            let chosen = try await trials.choose(only: wish.only, comparing: comparing)
            return LoadedPackages(
                packages: chosen.packages, unit: chosen.unit, figure: chosen.figure, figures: ledger.figures,
                prefillFrom: prefillFrom(chosen.figure))
        }

        /// From how many rows on a chunk is faster than as many single rows.
        private func prefillFrom(_ figure: UnitFigure) -> Int {
            guard let prefill = figure.prefillMs, prefill > 0, let decode = figure.decodeMs, decode > 0 else {
                return Int.max
            }
            return min(max(2, Int((prefill / decode).rounded(.up))), manifest.nPrefill)
        }
    }

    /// Core ML as the trials see it.
    private struct Trier: UnitTrier {
        let manifest: Manifest
        let compiled: [URL]
        let selfTest: SelfTest
        let report: @Sendable (LoadProgress) -> Void

        func load(_ unit: ComputeUnit, withPrefill: Bool) async throws -> [CoreMLPackage] {
            var packages: [CoreMLPackage] = []
            for (index, url) in compiled.enumerated() {
                report(.loading(unit, package: index, of: compiled.count))
                packages.append(
                    try await CoreMLPackage.load(url, manifest, index: index, unit: unit, withPrefill: withPrefill))
            }
            return packages
        }

        func test(_ packages: [CoreMLPackage], withPrefill: Bool) throws -> SelfTestResult {
            try pooled {
                try selfTest.run(packages, withPrefill: withPrefill) {
                    Double(DispatchTime.now().uptimeNanoseconds) / 1e9
                }
            }
        }

        func plan(_ unit: ComputeUnit) async -> String? {
            guard let first = compiled.first else { return nil }
            let configuration = MLModelConfiguration()
            configuration.computeUnits = unit.coreML
            configuration.functionName = PackageFunction.decode.rawValue
            guard let plan = try? await MLComputePlan.load(contentsOf: first, configuration: configuration),
                case .program(let program) = plan.modelStructure,
                let function = program.functions[PackageFunction.decode.rawValue] ?? program.functions.values.first
            else { return nil }
            var counts = (ane: 0, gpu: 0, cpu: 0)
            for operation in function.block.operations {
                switch plan.deviceUsage(for: operation)?.preferred {
                case .neuralEngine: counts.ane += 1
                case .gpu: counts.gpu += 1
                case .cpu: counts.cpu += 1
                default: break
                }
            }
            return "planned: \(counts.ane) operations ANE, \(counts.gpu) GPU, \(counts.cpu) CPU"
        }
    }
#endif

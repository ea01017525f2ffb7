// A package evaluated by Core ML. Inputs are copied into arrays that are made once per function; one MLState per session
// is shared by both functions (docs/COREML.md).
#if canImport(CoreML)
    import CoreML
    import DIMStage
    import Foundation

    public final class CoreMLPackage: Package {
        private final class State: PackageState {
            let state: MLState
            init(_ state: MLState) { self.state = state }
        }

        /// One function of the package and the arrays that it is fed from.
        private final class Function {
            let model: MLModel
            private let inputs: MLDictionaryFeatureProvider
            private let hidden: MLMultiArray  // [1, T, n_embd]
            private let position: MLMultiArray  // [1]
            private let cos: MLMultiArray  // [1, 1, T, head_dim]
            private let sin: MLMultiArray  // [1, 1, T, head_dim]
            private let mask: MLMultiArray  // [1, 1, T, n_ctx]

            init(_ model: MLModel, rows: Int, _ manifest: Manifest) throws {
                self.model = model
                func array(_ shape: [Int], _ type: MLMultiArrayDataType) throws -> MLMultiArray {
                    try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: type)
                }
                hidden = try array([1, rows, manifest.dims.nEmbd], .float16)
                position = try array([1], .int32)
                cos = try array([1, 1, rows, manifest.dims.headDim], .float16)
                sin = try array([1, 1, rows, manifest.dims.headDim], .float16)
                mask = try array([1, 1, rows, manifest.nCtx], .float16)
                inputs = try MLDictionaryFeatureProvider(dictionary: [
                    "hidden": MLFeatureValue(multiArray: hidden), "pos": MLFeatureValue(multiArray: position),
                    "cos": MLFeatureValue(multiArray: cos), "sin": MLFeatureValue(multiArray: sin),
                    "mask": MLFeatureValue(multiArray: mask),
                ])
            }

            func run(
                _ values: PackageInputs, _ state: MLState, into output: UnsafeMutableBufferPointer<Half>
            ) throws {
                copy(values.hidden, values.rows, into: hidden)
                copy(values.cos, values.rows, into: cos)
                copy(values.sin, values.rows, into: sin)
                copy(values.mask, values.rows, into: mask)
                position.withUnsafeMutableBytes { bytes, _ in
                    bytes.storeBytes(of: Int32(values.position), as: Int32.self)
                }
                // the provider's temporary objects go at once: a token loop never returns to a run loop
                try autoreleasepool {
                    let result = try model.prediction(from: inputs, using: state)
                    guard let rows = result.featureValue(for: "hidden_out")?.multiArrayValue else {
                        throw StageError.compute("the package gave no hidden_out")
                    }
                    guard rows.dataType == .float16, rows.count == output.count else {
                        throw StageError.compute("hidden_out has \(rows.count) values, not \(output.count) of fp16")
                    }
                    copy(rows, values.rows, into: output)
                }
            }

            /// `rows` rows into the last two axes of `array`, whatever its strides.
            private func copy(_ source: UnsafeBufferPointer<Half>, _ rows: Int, into array: MLMultiArray) {
                let columns = source.count / rows
                array.withUnsafeMutableBytes { bytes, strides in
                    let stride = strides[strides.count - 2]
                    for row in 0..<rows {
                        let line = UnsafeMutableRawBufferPointer(
                            rebasing: bytes[2 * row * stride..<2 * (row * stride + columns)])
                        line.copyMemory(
                            from: UnsafeRawBufferPointer(
                                UnsafeBufferPointer(rebasing: source[row * columns..<(row + 1) * columns])))
                    }
                }
            }

            private func copy(_ array: MLMultiArray, _ rows: Int, into target: UnsafeMutableBufferPointer<Half>) {
                let columns = target.count / rows
                let stride = array.strides[array.strides.count - 2].intValue
                array.withUnsafeBytes { bytes in
                    for row in 0..<rows {
                        let line = UnsafeRawBufferPointer(
                            rebasing: bytes[2 * row * stride..<2 * (row * stride + columns)])
                        UnsafeMutableRawBufferPointer(
                            UnsafeMutableBufferPointer(rebasing: target[row * columns..<(row + 1) * columns])
                        ).copyMemory(from: line)
                    }
                }
            }
        }

        public let blocks: ClosedRange<Int>
        private let decode: Function
        private let prefill: Function?

        /// Loads both functions on `unit`. `prefill` is left out where `withPrefill` is false.
        static func load(
            _ compiled: URL, _ manifest: Manifest, index: Int, unit: ComputeUnit, withPrefill: Bool
        ) async throws -> CoreMLPackage {
            func function(_ name: PackageFunction, rows: Int) async throws -> Function {
                let configuration = MLModelConfiguration()
                configuration.computeUnits = unit.coreML
                configuration.functionName = name.rawValue
                let model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
                return try Function(model, rows: rows, manifest)
            }
            let decode = try await function(.decode, rows: 1)
            var prefill: Function?
            if withPrefill { prefill = try await function(.prefill, rows: manifest.nPrefill) }
            return CoreMLPackage(manifest.packages[index].blocks, decode, prefill)
        }

        private init(_ blocks: ClosedRange<Int>, _ decode: Function, _ prefill: Function?) {
            self.blocks = blocks
            self.decode = decode
            self.prefill = prefill
        }

        public func makeState() throws(StageError) -> any PackageState { State(decode.model.makeState()) }

        public func evaluate(
            _ function: PackageFunction, _ inputs: PackageInputs, state: any PackageState,
            into output: UnsafeMutableBufferPointer<Half>
        ) throws(StageError) {
            guard let state = state as? State else { throw .compute("a state of another package") }
            guard let function = function == .decode ? decode : prefill else {
                throw .compute("prefill is not loaded")
            }
            do {
                try function.run(inputs, state.state, into: output)
            } catch let error as StageError {
                throw error
            } catch {
                throw .compute("Core ML: \(error.localizedDescription)")
            }
        }
    }

    extension ComputeUnit {
        var coreML: MLComputeUnits {
            switch self {
            case .cpu: .cpuOnly
            case .gpu: .cpuAndGPU
            case .ane: .cpuAndNeuralEngine
            }
        }
    }
#endif

// Stub: see Stubs/README.md
@_exported import Foundation

public enum MLMultiArrayDataType: Int, Sendable {
    case double = 65600
    case float32 = 65568
    case float16 = 65552
    case int32 = 131104
}

public enum MLComputeUnits: Int, Sendable {
    case cpuOnly = 0
    case cpuAndGPU = 1
    case all = 2
    case cpuAndNeuralEngine = 3
}

open class MLMultiArray {
    public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws { stub() }
    public var dataType: MLMultiArrayDataType { stub() }
    public var shape: [NSNumber] { stub() }
    public var strides: [NSNumber] { stub() }
    public var count: Int { stub() }
    public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R { stub() }
    public func withUnsafeMutableBytes<R>(
        _ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R
    ) rethrows -> R { stub() }
}

open class MLFeatureValue {
    public init(multiArray: MLMultiArray) { stub() }
    public var multiArrayValue: MLMultiArray? { stub() }
}

public protocol MLFeatureProvider: AnyObject {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

open class MLDictionaryFeatureProvider: MLFeatureProvider {
    public init(dictionary: [String: Any]) throws { stub() }
    public var featureNames: Set<String> { stub() }
    public func featureValue(for featureName: String) -> MLFeatureValue? { stub() }
}

open class MLModelConfiguration {
    public init() {}
    public var computeUnits: MLComputeUnits = .all
    public var functionName: String?
}

open class MLState {}

open class MLModel: @unchecked Sendable {
    public class func compileModel(at modelURL: URL) async throws -> URL { stub() }
    public class func load(contentsOf url: URL, configuration: MLModelConfiguration) async throws -> MLModel { stub() }
    public func makeState() -> MLState { stub() }
    public func prediction(from input: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider {
        stub()
    }
}

public enum MLComputeDevice {
    case cpu(MLCPUComputeDevice)
    case gpu(MLGPUComputeDevice)
    case neuralEngine(MLNeuralEngineComputeDevice)
}
public final class MLCPUComputeDevice {}
public final class MLGPUComputeDevice {}
public final class MLNeuralEngineComputeDevice {}

public enum MLModelStructure {
    case neuralNetwork(Never)
    case program(Program)
    case pipeline(Never)
    case unsupported

    public struct Program {
        public struct Operation {}
        public struct Block {
            public let operations: [Operation]
        }
        public struct Function {
            public let block: Block
        }
        public let functions: [String: Function]
    }
}

public final class MLComputePlan: @unchecked Sendable {
    public struct DeviceUsage {
        public let preferred: MLComputeDevice
    }
    public class func load(
        contentsOf url: URL, configuration: MLModelConfiguration
    ) async throws -> MLComputePlan { stub() }
    public var modelStructure: MLModelStructure { stub() }
    public func deviceUsage(for operation: MLModelStructure.Program.Operation) -> DeviceUsage? { stub() }
}

/// Foundation has it on Apple systems only.
public func autoreleasepool<R>(invoking body: () throws -> R) rethrows -> R { try body() }

private func stub() -> Never { fatalError("a stub") }

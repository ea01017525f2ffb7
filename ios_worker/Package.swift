// swift-tools-version: 6.0
// The phone's side of DIM as a package: everything of the worker but its screen. Arrows of dependency, one way:
//
//   DIMCrypto <- DIMWire <- DIMStage <- DIMReference   (plain Swift evaluation, any system)
//                                    <- DIMCoreML      (Apple systems)
//                        <- DIMServer <- dim-worker-swift
//                                     <- DIMPhone (the app without its screen) <- App/
//
// No package is fetched. On Apple systems the primitives are CryptoKit's, on Linux OpenSSL's (libssl-dev).
import PackageDescription

#if os(Linux)
    let cryptoDependencies: [Target.Dependency] = ["COpenSSL"]
    let systemTargets: [Target] = [
        .systemLibrary(name: "COpenSSL", providers: [.apt(["libssl-dev"])]),
        .target(name: "CThreadingFatal"),
    ]
    let observationDependencies: [Target.Dependency] = ["CThreadingFatal"]
#else
    let cryptoDependencies: [Target.Dependency] = []
    let systemTargets: [Target] = []
    let observationDependencies: [Target.Dependency] = []
#endif

let package = Package(
    name: "DIMWorker",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(
            name: "DIMWorkerKit", targets: ["DIMWire", "DIMCrypto", "DIMStage", "DIMCoreML", "DIMServer", "DIMPhone"]),
        .executable(name: "dim-worker-swift", targets: ["dim-worker-swift"]),
    ],
    targets: systemTargets + [
        .target(name: "DIMCrypto", dependencies: cryptoDependencies),
        .target(name: "DIMWire", dependencies: ["DIMCrypto"]),
        .target(name: "DIMStage", dependencies: ["DIMWire"]),
        .target(name: "DIMReference", dependencies: ["DIMStage"]),
        .target(name: "DIMCoreML", dependencies: ["DIMStage"]),
        .target(name: "DIMServer", dependencies: ["DIMWire", "DIMStage"]),
        .target(name: "DIMPhone", dependencies: ["DIMServer", "DIMCoreML"] + observationDependencies),
        .executableTarget(
            name: "dim-worker-swift", dependencies: ["DIMServer", "DIMReference", "DIMCoreML"]),
        .target(name: "TestFixtures", dependencies: ["DIMStage"], path: "Tests/TestFixtures"),
        .testTarget(name: "DIMCryptoTests", dependencies: ["DIMCrypto"]),
        .testTarget(name: "DIMWireTests", dependencies: ["DIMWire"]),
        .testTarget(name: "DIMStageTests", dependencies: ["DIMStage", "DIMReference", "TestFixtures"]),
        .testTarget(name: "DIMCoreMLTests", dependencies: ["DIMCoreML", "TestFixtures"]),
        .testTarget(name: "DIMPhoneTests", dependencies: ["DIMPhone", "TestFixtures"]),
        .testTarget(name: "DIMServerTests", dependencies: ["DIMServer", "DIMPhone", "TestFixtures"]),
    ],
    swiftLanguageModes: [.v6]
)

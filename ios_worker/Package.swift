// swift-tools-version: 6.0
// The phone's side of DIM as a package: everything of the worker but its screen. Arrows of dependency, one way:
//
//   DIMCrypto <- DIMWire <- DIMStage <- DIMReference   (plain Swift evaluation, any system)
//                                    <- DIMCoreML      (Apple systems)
//                        <- DIMServer <- dim-worker-swift, App/
//
// No package is fetched. On Apple systems the primitives are CryptoKit's, on Linux OpenSSL's (libssl-dev).
import PackageDescription

#if os(Linux)
    let cryptoDependencies: [Target.Dependency] = ["COpenSSL"]
    let systemTargets: [Target] = [
        .systemLibrary(name: "COpenSSL", providers: [.apt(["libssl-dev"])])
    ]
#else
    let cryptoDependencies: [Target.Dependency] = []
    let systemTargets: [Target] = []
#endif

let package = Package(
    name: "DIMWorker",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [.library(name: "DIMWorkerKit", targets: ["DIMWire"])],
    targets: systemTargets + [
        .target(name: "DIMCrypto", dependencies: cryptoDependencies),
        .target(name: "DIMWire", dependencies: ["DIMCrypto"]),
        .testTarget(name: "DIMCryptoTests", dependencies: ["DIMCrypto"]),
        .testTarget(name: "DIMWireTests", dependencies: ["DIMWire"]),
    ],
    swiftLanguageModes: [.v6]
)

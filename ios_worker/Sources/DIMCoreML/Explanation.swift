// An error of loading or running packages, as a person should read it: what refused what, with the system's number.
import DIMStage
import Foundation

/// One sentence without a full stop.
public func explanation(of error: any Error) -> String {
    switch error {
    case let error as ManifestError: return error.description
    case let error as StageError:
        let text = error.report(step: 0, worker: "this device").text
        return known(text, code: nil) ?? text
    default:
        let system = error as NSError
        // the framework's own description is in the innermost error
        var texts = [system.localizedDescription]
        var next = system.userInfo[NSUnderlyingErrorKey] as? NSError
        while let inner = next, texts.count < 5 {
            texts.append(inner.localizedDescription)
            next = inner.userInfo[NSUnderlyingErrorKey] as? NSError
        }
        return known(texts.joined(separator: " "), code: system.code) ?? "\(texts[0]) (\(system.code))"
    }
}

/// What others saw Core ML say, and what it meant.
private func known(_ text: String, code: Int?) -> String? {
    let table: [(said: [String], code: Int?, means: String)] = [
        (["ANECCompile"], nil, "the Neural Engine refused the program (11)"),
        (["0x1d", "0x1D"], nil, "the Neural Engine stopped while it ran the program (0x1d)"),
        (["input 'kv' not found"], nil, "the system does not know the package's state again"),
        (["execution plan"], -14, "the system could not plan the program (-14)"),
        (["execution plan"], 11, "the Neural Engine refused the program (11)"),
        (["execution plan"], nil, "the system could not plan the program" + (code.map { " (\($0))" } ?? "")),
    ]
    return table.first { row in
        row.said.contains { text.contains($0) }
            && (row.code == nil || row.code == code || text.contains("error code: \(row.code!)"))
    }?.means
}

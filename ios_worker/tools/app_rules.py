"""What check_project.py checks beside the project file: the shared scheme, the entitlements, the assets, and rules that the
app's sources must keep because nothing on Linux can run them. Each rule has a planted fault that it must find."""

import json
import pathlib
import plistlib
import re
import struct
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
APP = ROOT / "App"
SCHEME = APP / "DIMWorker.xcodeproj" / "xcshareddata" / "xcschemes" / "DIMWorker.xcscheme"
ICON = APP / "DIMWorker" / "Assets.xcassets" / "AppIcon.appiconset"


def check_scheme(text, target):
    """Run, Profile and Archive are optimised, with Metal's checks off: the first figures that a person sees are real ones."""
    if text is None:
        return ["there is no shared scheme: Run would build Debug"]
    try:
        scheme = xml.etree.ElementTree.fromstring(text)
    except xml.etree.ElementTree.ParseError as error:
        return [f"the scheme is no XML: {error}"]
    faults = []
    for action in ["LaunchAction", "ProfileAction", "ArchiveAction"]:
        found = scheme.find(action)
        if found is None or found.get("buildConfiguration") != "Release":
            faults.append(f"the scheme's {action} is not Release")
    launch = scheme.find("LaunchAction")
    for key, value in {"enableGPUValidationMode": "1", "enableGPUFrameCaptureMode": "3"}.items():
        if launch is None or launch.get(key) != value:
            faults.append(f"the scheme's {key} is not off")
    references = scheme.findall(".//BuildableReference")
    for reference in references:
        if (reference.get("BlueprintIdentifier"), reference.get("BlueprintName")) != target:
            faults.append(f"the scheme names {reference.get('BlueprintIdentifier')}, the target is {target[0]}")
        if reference.get("ReferencedContainer") != "container:DIMWorker.xcodeproj":
            faults.append(f"the scheme's container is {reference.get('ReferencedContainer')}")
    entry = scheme.find("BuildAction/BuildActionEntries/BuildActionEntry")
    if entry is None or entry.get("buildForRunning") != "YES" or scheme.find("LaunchAction//BuildableReference") is None:
        faults.append("the scheme runs nothing")
    return faults


def check_entitlements(entitlements):
    """The file that whoever has a paid team may switch on."""
    key = "com.apple.developer.kernel.increased-memory-limit"
    faults = [] if entitlements.get(key) is True else [f"the entitlement {key} is missing"]
    return faults + [f"the entitlement {other} is not needed" for other in entitlements if other != key]


def check_icon(contents, read):
    """One opaque image of 1024 x 1024. `read` gives a file's bytes, or None."""
    faults = []
    images = contents.get("images", [])
    if not any(image.get("size") == "1024x1024" and image.get("filename") for image in images):
        faults.append("the app has no icon of 1024x1024: a white square on the home screen")
    for image in images:
        if "filename" not in image:
            continue
        data = read(image["filename"])
        if data is None or data[:8] != b"\x89PNG\r\n\x1a\n":
            faults.append(f"the icon {image['filename']} is no PNG")
            continue
        width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
        if (width, height, depth) != (1024, 1024, 8):
            faults.append(f"the icon is {width} x {height} with {depth} bits")
        if colour != 2:
            faults.append("the icon has an alpha channel or a palette")
    return faults


def check_assets():
    faults = []
    catalogue = APP / "DIMWorker" / "Assets.xcassets"
    for file in [catalogue / "Contents.json", *catalogue.rglob("*/Contents.json")]:
        try:
            json.loads(file.read_text())
        except (OSError, ValueError) as error:
            faults.append(f"{file.name}: {error}")
    for name in ["AppIcon.appiconset", "AccentColor.colorset"]:
        if not (catalogue / name / "Contents.json").is_file():
            faults.append(f"the asset {name} is missing")
    return faults


def read_icon(name):
    return (ICON / name).read_bytes() if (ICON / name).is_file() else None


def check(target):
    """Every fault found, as sentences."""
    scheme = SCHEME.read_text() if SCHEME.is_file() else None
    entitlements = plistlib.loads((APP / "DIMWorker.entitlements").read_bytes())
    contents = json.loads((ICON / "Contents.json").read_text())
    return [
        *check_scheme(scheme, target), *check_entitlements(entitlements), *check_assets(),
        *check_icon(contents, read_icon), *check_sources(sources())]


def plant(target):
    """Faulty copies, by name, with the check that must find them."""
    scheme = SCHEME.read_text()
    entitlements = plistlib.loads((APP / "DIMWorker.entitlements").read_bytes())
    contents = json.loads((ICON / "Contents.json").read_text())
    icon = read_icon("icon.png")

    yield "no shared scheme", lambda: check_scheme(None, target)
    yield "a scheme that is cut short", lambda: check_scheme(scheme[:300], target)
    yield "Run builds Debug", lambda: check_scheme(
        re.sub(r'(<LaunchAction\s+buildConfiguration = )"Release"', r'\1"Debug"', scheme), target)
    yield "Metal's checks are on", lambda: check_scheme(scheme.replace("enableGPUValidationMode = \"1\"", ""), target)
    yield "frames are captured", lambda: check_scheme(scheme.replace("CaptureMode = \"3\"", "CaptureMode = \"0\""), target)
    yield "a scheme of another target", lambda: check_scheme(scheme, ("D1A0000000000000000000FF", target[1]))
    yield "a scheme that runs nothing", lambda: check_scheme(
        re.sub(r"<BuildableProductRunnable.*?</BuildableProductRunnable>", "", scheme, flags=re.S), target)
    yield "no entitlement", lambda: check_entitlements({})
    yield "an entitlement too many", lambda: check_entitlements(entitlements | {"aps-environment": "production"})
    bare = {"images": [{k: v for k, v in image.items() if k != "filename"} for image in contents["images"]]}
    yield "no icon", lambda: check_icon(bare, read_icon)
    yield "an icon that is not there", lambda: check_icon(contents, lambda name: None)
    yield "an icon with alpha", lambda: check_icon(contents, lambda name: icon[:25] + b"\x06" + icon[26:])
    yield "a small icon", lambda: check_icon(contents, lambda name: icon[:16] + struct.pack(">II", 512, 512) + icon[24:])
    for name, file, pattern, replacement in PLANTED:
        yield name, lambda f=file, p=pattern, r=replacement: check_sources(altered(f, p, r))


# MARK: rules of the sources

def sources():
    """Every Swift file of the app and the package, by its path from ios_worker."""
    files = [*APP.rglob("*.swift"), *(ROOT / "Sources").rglob("*.swift")]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


def altered(file, pattern, replacement):
    """All sources with a fault in one of them. A pattern that is not there would plant nothing: that is an error."""
    texts = sources()
    text, count = re.subn(pattern, replacement, texts[file], count=1, flags=re.S)
    if count != 1:
        raise SystemExit(f"error: nothing to plant in {file}: {pattern}")
    return texts | {file: text}


def without_comments(text):
    return re.sub(r"//[^\n]*", "", text)


def check_sources(texts):
    faults = []
    for file, text in texts.items():
        text = without_comments(text)
        for pattern, why in FORBIDDEN:
            if re.search(pattern, text):
                faults.append(f"{file}: {why}")
    for file, pattern, why in REQUIRED:
        if not re.search(pattern, without_comments(texts.get(file, "")), re.S):
            faults.append(f"{file}: {why}")
    return faults + check_views(texts[APP_FILES + "WorkerView.swift"])


# pattern, why not
FORBIDDEN = [
    (r"\.read\(upToCount|\.readToEnd\(|\.readData\(|\.availableData|\.write\(contentsOf",
     "FileHandle gives autoreleased data: a loop on a thread without a pool holds the whole file"),
    (r"\[CFString: Any\] = \[(?=[^\]]*kSecReturnData)[^\]]*kSecMatchLimitAll",
     "the secrets of all items at once: refused on macOS, and not to be asked"),
    (r"\bADDRESS\b", "a word that stands for an address, where the address is known"),
    (r"= UIDevice\.current\.name", "every iPhone is called iPhone"),
    (r"CIQRCode|CIContext", "a picture computed for each drawing"),
    (r'"\\\(error\)"', "the name of an error's case is no sentence"),
]
APP_FILES = "App/DIMWorker/"
# file, pattern, what is wrong without it
REQUIRED = [
    (APP_FILES + "DIMWorkerApp.swift", r"\.onChange\(of: phase, initial: true\)",
     "the first phase is not told: an app that starts active listens to nothing"),
    (APP_FILES + "System.swift", r"NWPathMonitor\(\)", "a change of the network is not seen"),
    (APP_FILES + "Worker.swift", r"network\.start \{ \[weak self\] in self\?\.refreshAddresses\(\) \}",
     "a change of the network is not followed"),
    (APP_FILES + "Worker.swift", r"control\.pause\(background\)", "goodbyes are said on the main thread"),
    (APP_FILES + "Worker.swift", r"case \.load: loading\.want", "a push that ends during a load is dropped"),
    (APP_FILES + "Worker.swift", r"excludeFromBackup\(place\)", "gigabytes of weights in the backup"),
    (APP_FILES + "WorkerView.swift", r'Button\("Try again"\)', "after a failed load there is no second try"),
    (APP_FILES + "WorkerView.swift", r'Button\("Delete"', "what was pushed cannot be deleted"),
    (APP_FILES + "PairingView.swift", r"pairing\.command\(address\)", "the command is not shown whole"),
]


def check_views(text):
    """What changes twice a second is read by two small views, not by the one that holds the list."""
    faults = []
    for name, body in re.findall(r"struct (\w+): View[^{]*\{(.*?)\n\}", text, re.S):
        if name not in ("HostSection", "DeviceSection") and re.search(r"screen\.(steps|device)\b", body):
            faults.append(f"WorkerView.swift: {name} is drawn anew twice a second")
    return faults


# name, file, pattern, replacement
PLANTED = [
    ("a file is read through FileHandle", "Sources/DIMStage/RawFile.swift", r"$",
     "\nfunc bad(_ file: FileHandle) throws { while let piece = try file.read(upToCount: 1) { _ = piece } }\n"),
    ("all secrets at once", APP_FILES + "KeychainStore.swift", "kSecReturnAttributes: true", "kSecReturnData: true"),
    ("no first phase", APP_FILES + "DIMWorkerApp.swift", "of: phase, initial: true", "of: phase"),
    ("the address as a word", APP_FILES + "PairingView.swift", '"On the host:"', '"dim-host pair ADDRESS"'),
    ("a QR code for each drawing", APP_FILES + "PairingView.swift", "import UIKit", "import UIKit\nlet c = CIContext()"),
    ("no monitor of the network", APP_FILES + "System.swift", r"NWPathMonitor\(\)", "nil"),
    ("a change of the network is ignored", APP_FILES + "Worker.swift", r"self\?\.refreshAddresses\(\) \}", "}"),
    ("one name for every phone", APP_FILES + "Worker.swift", r"DeviceName\.best\(.*?\)\)", "UIDevice.current.name"),
    ("goodbyes on the main thread", APP_FILES + "Worker.swift", r"control\.pause\(background\)", "server.stop(.pausing)"),
    ("a push that is dropped", APP_FILES + "Worker.swift", r"case \.load: loading\.want\(\.init\(\)\)", "case .load: break"),
    ("slices in the backup", APP_FILES + "Worker.swift", r"excludeFromBackup\(place\)", ""),
    ("no second try", APP_FILES + "WorkerView.swift", r'Button\("Try again"\) \{ worker.tryAgain\(\) \}', ""),
    ("slices for ever", APP_FILES + "WorkerView.swift", r'Button\("Delete", role: .destructive\)', 'Button("Keep")'),
    ("half a command", APP_FILES + "PairingView.swift", r"pairing\.command\(address\)", "pairing.code"),
    ("the whole list twice a second", APP_FILES + "WorkerView.swift", r'value: worker\.screen\.slice \?\? "none"',
     'value: "\\(worker.screen.steps.rows)"'),
    ("an error by the name of its case", "Sources/DIMCoreML/UnitTrials.swift", r"explanation\(of: error\)",
     '"\\\\(error)"'),
]

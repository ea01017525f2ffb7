"""Structural checks of the Xcode project, for machines without Xcode.

Reads App/DIMWorker.xcodeproj with openstep-parser (PyPI) and checks that every id resolves and every object is reachable,
every class is one that Xcode has, every Swift file of the app is in the target, the package and its product exist, and
the property-list keys that the app needs are there. With app_rules.py it also looks at the shared scheme, the
entitlements, the assets and the app's sources. Then plants faults in copies of all that and checks that each is found.
None of this shows that Xcode opens or builds the project.
"""

import copy
import pathlib
import plistlib
import re
import sys

import app_rules
from openstep_parser import OpenStepDecoder

ROOT = pathlib.Path(__file__).resolve().parent.parent
APP = ROOT / "App"
PROJECT = APP / "DIMWorker.xcodeproj" / "project.pbxproj"

CLASSES = {
    "PBXBuildFile", "PBXFileReference", "PBXFileSystemSynchronizedRootGroup", "PBXFrameworksBuildPhase", "PBXGroup",
    "PBXNativeTarget", "PBXProject", "PBXResourcesBuildPhase", "PBXSourcesBuildPhase", "XCBuildConfiguration",
    "XCConfigurationList", "XCLocalSwiftPackageReference", "XCSwiftPackageProductDependency",
}
# the fields that hold ids, by class
LINKS = {
    "PBXBuildFile": ["productRef"],
    "PBXGroup": ["children"],
    "PBXNativeTarget": [
        "buildConfigurationList", "buildPhases", "dependencies", "fileSystemSynchronizedGroups",
        "packageProductDependencies", "productReference",
    ],
    "PBXProject": ["buildConfigurationList", "mainGroup", "packageReferences", "productRefGroup", "targets"],
    "PBXFrameworksBuildPhase": ["files"], "PBXResourcesBuildPhase": ["files"], "PBXSourcesBuildPhase": ["files"],
    "XCConfigurationList": ["buildConfigurations"], "XCSwiftPackageProductDependency": ["package"],
}
SYSTEM_MODULES = {
    "Darwin", "Dispatch", "Foundation", "Network", "Observation", "Security", "SwiftUI", "UIKit", "dnssd",
}


def check_project(project):
    """Every fault found, as sentences."""
    faults = []
    objects = project.get("objects", {})
    if str(project.get("objectVersion")) != "77":
        faults.append(f"objectVersion is {project.get('objectVersion')}, synchronized folders need 77")

    def get(identifier, wanted, where):
        found = objects.get(identifier)
        if found is None:
            faults.append(f"{where} names {identifier}, which is not there")
        elif wanted and found.get("isa") != wanted:
            faults.append(f"{where} is a {found.get('isa')}, not a {wanted}")
        return found or {}

    reached, queue = set(), [project.get("rootObject")]
    while queue:
        identifier = queue.pop()
        if identifier in reached:
            continue
        reached.add(identifier)
        thing = get(identifier, None, "a link")
        isa = thing.get("isa")
        if isa not in CLASSES:
            faults.append(f"{identifier} is of class {isa}")
        for field in LINKS.get(isa, []):
            value = thing.get(field, [])
            queue += value if isinstance(value, list) else [value]
    for identifier in objects:
        if not re.fullmatch(r"[0-9A-F]{24}", identifier):
            faults.append(f"{identifier} is no id")
        if identifier not in reached:
            faults.append(f"{identifier} is reachable from nowhere")

    root = get(project.get("rootObject"), "PBXProject", "rootObject")
    targets = [get(identifier, "PBXNativeTarget", "a target") for identifier in root.get("targets", [])]
    if len(targets) != 1:
        return faults + [f"{len(targets)} targets, expected the app"]
    target = targets[0]

    phases = [get(identifier, None, "a phase").get("isa") for identifier in target.get("buildPhases", [])]
    for wanted in ["PBXSourcesBuildPhase", "PBXFrameworksBuildPhase", "PBXResourcesBuildPhase"]:
        if phases.count(wanted) != 1:
            faults.append(f"{phases.count(wanted)} phases of class {wanted}")

    # every source in the target: it lies in a synchronized folder of it
    folders = []
    for identifier in target.get("fileSystemSynchronizedGroups", []):
        folder = get(identifier, "PBXFileSystemSynchronizedRootGroup", "a synchronized folder")
        folders.append(APP / folder.get("path", "?"))
        if not folders[-1].is_dir():
            faults.append(f"the folder {folder.get('path')} is not there")
    sources = sorted(APP.rglob("*.swift"))
    for source in sources:
        if not any(folder in source.parents for folder in folders):
            faults.append(f"{source.name} is in no target")
    if not any("@main" in source.read_text() for source in sources):
        faults.append("no file has @main")

    # the package, its product, and what the app imports of it
    for identifier in root.get("packageReferences", []):
        package = get(identifier, "XCLocalSwiftPackageReference", "a package")
        manifest = APP / package.get("relativePath", "?") / "Package.swift"
        if not manifest.is_file():
            faults.append(f"there is no package at {package.get('relativePath')}")
            continue
        text = manifest.read_text()
        for dependency in target.get("packageProductDependencies", []):
            product = get(dependency, "XCSwiftPackageProductDependency", "a product").get("productName")
            found = re.search(rf'\.library\(\s*name: "{product}",\s*targets: \[([^\]]*)\]', text)
            if not found:
                faults.append(f"the package has no product {product}")
                continue
            modules = set(re.findall(r'"(\w+)"', found.group(1)))
            for source in sources:
                for module in re.findall(r"^import (\w+)$", source.read_text(), re.M):
                    if module not in modules | SYSTEM_MODULES:
                        faults.append(f"{source.name} imports {module}, which {product} does not have")
    # Xcode.app (not xcodebuild) says "Missing package product" where a product does not name its package
    for dependency in target.get("packageProductDependencies", []):
        package = get(dependency, "XCSwiftPackageProductDependency", "a product").get("package")
        if package not in root.get("packageReferences", []):
            faults.append(f"the product {dependency} does not name the project's package, but {package}")
    linked = [
        get(file, "PBXBuildFile", "a linked file").get("productRef")
        for identifier in target.get("buildPhases", [])
        for file in get(identifier, None, "a phase").get("files", [])
    ]
    for dependency in target.get("packageProductDependencies", []):
        if dependency not in linked:
            faults.append(f"{dependency} is not linked")

    configurations = get(target.get("buildConfigurationList"), "XCConfigurationList", "configurations")
    project_wide = get(root.get("buildConfigurationList"), "XCConfigurationList", "configurations")

    def settings(of, name):
        for identifier in of.get("buildConfigurations", []):
            configuration = get(identifier, "XCBuildConfiguration", "a configuration")
            if configuration.get("name") == name:
                return configuration.get("buildSettings", {})
        faults.append(f"there is no configuration {name}")
        return {}

    for name in ["Debug", "Release"]:
        merged = settings(project_wide, name) | settings(configurations, name)
        for key, value in {
            "IPHONEOS_DEPLOYMENT_TARGET": "18.0", "SWIFT_VERSION": "6.0", "CODE_SIGN_STYLE": "Automatic",
            "SDKROOT": "iphoneos",
        }.items():
            if str(merged.get(key)) != value:
                faults.append(f"{name}: {key} is {merged.get(key)}, expected {value}")
        if "$(DEVELOPMENT_TEAM)" not in merged.get("PRODUCT_BUNDLE_IDENTIFIER", ""):
            faults.append(f"{name}: the bundle id is not each team's own")
        if not (APP / merged.get("INFOPLIST_FILE", "?")).is_file():
            faults.append(f"{name}: INFOPLIST_FILE names {merged.get('INFOPLIST_FILE')}, which is not there")
        # a profile without the entitlement (free accounts, today) does not sign: it is for those who add it themselves
        for key in merged:
            if key.startswith("CODE_SIGN_ENTITLEMENTS"):
                faults.append(f"{name}: {key} is on for everybody: a free team cannot sign it")
    return faults


def check_info(info):
    faults = []
    for key, wanted in {
        "NSBonjourServices": lambda v: "_dim._tcp" in v,
        "NSLocalNetworkUsageDescription": lambda v: len(v) > 20,
        "UIFileSharingEnabled": lambda v: v is True,
        "LSSupportsOpeningDocumentsInPlace": lambda v: v is True,
        "UILaunchScreen": lambda v: isinstance(v, dict),
        "CFBundleExecutable": lambda v: v == "$(EXECUTABLE_NAME)",
        "CFBundleIdentifier": lambda v: v == "$(PRODUCT_BUNDLE_IDENTIFIER)",
        "CFBundlePackageType": lambda v: v == "APPL",
    }.items():
        if key not in info:
            faults.append(f"Info.plist has no {key}")
        elif not wanted(info[key]):
            faults.append(f"Info.plist: {key} is {info[key]!r}")
    return faults


def plant(project, info):
    """Faulty copies, by name, with the check that must find them."""
    objects = project["objects"]

    def changed(change):
        broken = copy.deepcopy(project)
        change(broken["objects"])
        return lambda: check_project(broken)

    def set_field(isa, field, value):
        def change(things):
            for thing in things.values():
                if thing["isa"] == isa:
                    thing[field] = value
        return changed(change)

    yield "an older object version", lambda: check_project(project | {"objectVersion": "56"})
    for identifier, thing in objects.items():
        if thing["isa"] not in ("PBXFileReference",):
            yield f"{thing['isa']} {identifier} removed", changed(lambda things, i=identifier: things.pop(i))
    yield "an unknown class", set_field("PBXGroup", "isa", "PBXGruppe")
    yield "an orphan", changed(lambda things: things.update({"D1A0000000000000000000FF": {"isa": "PBXGroup"}}))
    yield "a folder that is not there", set_field("PBXFileSystemSynchronizedRootGroup", "path", "Elsewhere")
    yield "a package that is not there", set_field("XCLocalSwiftPackageReference", "relativePath", "../..")
    yield "an unknown product", set_field("XCSwiftPackageProductDependency", "productName", "Other")
    yield "a product without its package", changed(lambda things: [thing.pop("package", None) for thing in things.values()])
    yield "a product of another package", set_field("XCSwiftPackageProductDependency", "package", "D1A000000000000000000006")
    yield "no linked product", set_field("PBXFrameworksBuildPhase", "files", [])
    yield "no sources phase", set_field("PBXSourcesBuildPhase", "isa", "PBXResourcesBuildPhase")
    for key in ["INFOPLIST_FILE", "SWIFT_VERSION", "IPHONEOS_DEPLOYMENT_TARGET"]:
        def drop(things, key=key):
            for thing in things.values():
                if thing["isa"] == "XCBuildConfiguration":
                    thing["buildSettings"].pop(key, None)
        yield f"{key} missing", changed(drop)
    for key in ["CODE_SIGN_ENTITLEMENTS", "CODE_SIGN_ENTITLEMENTS[sdk=iphoneos*]"]:
        def add(things, key=key):
            for thing in things.values():
                if thing["isa"] == "XCBuildConfiguration" and thing["name"] == "Release":
                    thing["buildSettings"][key] = "DIMWorker.entitlements"
        yield f"{key} for everybody", changed(add)
    for key in ["NSBonjourServices", "NSLocalNetworkUsageDescription", "UIFileSharingEnabled"]:
        yield f"{key} missing", lambda key=key: check_info({k: v for k, v in info.items() if k != key})


def target_of(project):
    """The id and the name of the app's target, which the shared scheme must name."""
    return next(
        (identifier, thing["name"]) for identifier, thing in project["objects"].items()
        if thing["isa"] == "PBXNativeTarget")


def main():
    with PROJECT.open(encoding="utf-8") as file:
        project = OpenStepDecoder.ParseFromFile(file)
    info = plistlib.loads((APP / "Info.plist").read_bytes())
    target = target_of(project)
    faults = check_project(project) + check_info(info) + app_rules.check(target)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    planted = [*plant(project, info), *app_rules.plant(target)]
    missed = [name for name, check in planted if not check()]
    for name in missed:
        print(f"error: the planted fault was not found: {name}", file=sys.stderr)
    if faults or missed:
        sys.exit(1)
    print(f"Xcode project: {len(project['objects'])} objects, no fault; {len(planted)} planted faults, all found")


if __name__ == "__main__":
    main()

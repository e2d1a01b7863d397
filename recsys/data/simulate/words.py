"""Words that titles are made of, English and Chinese side by side."""

from __future__ import annotations

DEPARTMENTS: dict[str, list[tuple[str, str]]] = {
    "Beauty": [
        ("Face Cream", "面霜"), ("Lipstick", "口红"), ("Sunscreen", "防晒霜"), ("Shampoo", "洗发水"),
        ("Perfume", "香水"), ("Sheet Mask", "面膜"), ("Eye Serum", "眼部精华"), ("Hand Cream", "护手霜"),
    ],
    "Phones": [
        ("Smartphone", "智能手机"), ("Phone Case", "手机壳"), ("Power Bank", "充电宝"), ("Earbuds", "蓝牙耳机"),
        ("Smart Watch", "智能手表"), ("Charger", "充电器"), ("Selfie Stick", "自拍杆"), ("Car Mount", "车载支架"),
    ],
    "Computers": [
        ("Laptop", "笔记本电脑"), ("Tablet", "平板电脑"), ("Keyboard", "机械键盘"), ("Mouse", "无线鼠标"),
        ("Monitor", "显示器"), ("SSD", "固态硬盘"), ("Webcam", "摄像头"), ("Router", "路由器"),
    ],
    "Women": [
        ("Down Jacket", "羽绒服"), ("Knit Sweater", "针织衫"), ("Dress", "连衣裙"), ("Jeans", "牛仔裤"),
        ("Silk Scarf", "丝巾"), ("Leggings", "打底裤"), ("Trench Coat", "风衣"), ("Pajamas", "睡衣"),
    ],
    "Men": [
        ("Hoodie", "卫衣"), ("Business Shirt", "衬衫"), ("Chinos", "休闲裤"), ("Polo Shirt", "POLO衫"),
        ("Leather Belt", "皮带"), ("Padded Vest", "羽绒马甲"), ("Boxer Briefs", "平角内裤"), ("Wool Socks", "羊毛袜"),
    ],
    "Shoes": [
        ("Running Shoes", "跑步鞋"), ("Snow Boots", "雪地靴"), ("Sneakers", "板鞋"), ("Loafers", "乐福鞋"),
        ("Sandals", "凉鞋"), ("Hiking Boots", "登山鞋"), ("High Heels", "高跟鞋"), ("Slippers", "拖鞋"),
    ],
    "Home": [
        ("Duvet", "羽绒被"), ("Pillow", "枕头"), ("Bedding Set", "四件套"), ("Storage Box", "收纳箱"),
        ("Curtains", "窗帘"), ("Floor Lamp", "落地灯"), ("Carpet", "地毯"), ("Towel Set", "毛巾套装"),
    ],
    "Appliances": [
        ("Air Fryer", "空气炸锅"), ("Rice Cooker", "电饭煲"), ("Robot Vacuum", "扫地机器人"), ("Humidifier", "加湿器"),
        ("Hair Dryer", "吹风机"), ("Electric Kettle", "电热水壶"), ("Air Purifier", "空气净化器"),
        ("Electric Blanket", "电热毯"),
    ],
    "Baby": [
        ("Diapers", "纸尿裤"), ("Baby Formula", "婴儿奶粉"), ("Stroller", "婴儿推车"), ("Building Blocks", "积木"),
        ("Baby Bottle", "奶瓶"), ("Car Seat", "安全座椅"), ("Picture Book", "绘本"), ("Romper", "连体衣"),
    ],
    "Food": [
        ("Mixed Nuts", "坚果礼盒"), ("Green Tea", "绿茶"), ("Coffee Beans", "咖啡豆"), ("Instant Noodles", "方便面"),
        ("Olive Oil", "橄榄油"), ("Dark Chocolate", "黑巧克力"), ("Beef Jerky", "牛肉干"), ("Rice", "大米"),
    ],
    "Sports": [
        ("Yoga Mat", "瑜伽垫"), ("Dumbbells", "哑铃"), ("Camping Tent", "露营帐篷"), ("Badminton Racket", "羽毛球拍"),
        ("Bike Helmet", "骑行头盔"), ("Swim Goggles", "泳镜"), ("Jump Rope", "跳绳"), ("Backpack", "双肩包"),
    ],
    "Pets": [
        ("Cat Food", "猫粮"), ("Dog Treats", "狗零食"), ("Cat Litter", "猫砂"), ("Pet Bed", "宠物窝"),
        ("Dog Leash", "牵引绳"), ("Fish Tank", "鱼缸"), ("Cat Tree", "猫爬架"), ("Pet Shampoo", "宠物香波"),
    ],
}  # fmt: skip

BRANDS: list[tuple[str, str]] = [
    ("Luoyan", "洛颜"), ("Qingmu", "青木"), ("Northpine", "北松"), ("Heyue", "和悦"), ("Zhenpin", "臻品"),
    ("Auralis", "澳澜"), ("Beishan", "北山"), ("Yunmo", "云墨"), ("Solvane", "索凡"), ("Tianlan", "天蓝"),
    ("Mingdu", "明都"), ("Kestrel", "凯思"), ("Xiaohe", "小禾"), ("Orbita", "欧碧"), ("Fengye", "枫叶"),
    ("Halcyon", "海宁"), ("Lanting", "兰亭"), ("Vireo", "维瑞"), ("Jinghua", "京华"), ("Maplewood", "美坞"),
    ("Shuimo", "水墨"), ("Novaterra", "诺拓"), ("Ruixiang", "瑞祥"), ("Pelican", "鹈鹕"), ("Anran", "安然"),
    ("Cobalt", "科宝"), ("Yishu", "艺术家"), ("Brightwell", "明井"), ("Dashan", "大山"), ("Everline", "恒线"),
    ("Hongmei", "红梅"), ("Quillon", "奎伦"), ("Siji", "四季"), ("Tidewater", "潮水"), ("Wanjia", "万家"),
    ("Zephyrine", "泽风"), ("Baihe", "百合"), ("Lumen & Co", "流明"), ("Chunhui", "春晖"), ("Stonebridge", "石桥"),
]  # fmt: skip

ADJECTIVES: list[tuple[str, str]] = [
    ("Classic", "经典"), ("Premium", "高端"), ("Lightweight", "轻便"), ("Kids'", "儿童"), ("Travel", "旅行"),
    ("Organic", "有机"), ("Limited Edition", "限量版"), ("Everyday", "日常"), ("Professional", "专业"),
    ("Mini", "迷你"), ("Extra Large", "加大号"), ("Vintage", "复古"), ("Minimalist", "简约"), ("Winter", "冬季加厚"),
    ("Gift Box", "礼盒装"), ("Value Pack", "超值装"),
]  # fmt: skip
